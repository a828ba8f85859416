"""Tables of evaluations."""

import csv
import json

import pytest

from vmoe_torch.evaluate import Evaluation, Flops, RoutingSetting, format_table, write_csv, write_json
from vmoe_torch.evaluate.table import aligned


@pytest.fixture
def evaluations():
    return [
        Evaluation(RoutingSetting(1.05, 2, True), 200, 0.875, 0.99, 0.4, 1.051, 0.05, 0.01, Flops(4.0e6, 2.0e6)),
        Evaluation(RoutingSetting(), 200, 0.5, 0.9, 1.25, 0.102, 0.9, 0.8, Flops(1.0e6, 2.0e6)),
    ]


def test_format_table_aligns_its_columns(evaluations):
    header, rule, *lines = format_table(evaluations).splitlines()
    assert {len(line) for line in (header, rule, *lines)} == {len(header)}
    assert lines[0].split() == ["2", "1.05", "1.051", "BPR", "87.50", "99.00", "0.400", "5.0", "4.00", "2.000"]
    assert lines[1].split()[:4] == ["-", "-", "0.102", "-"]


def test_experts_of_several_sizes_show_what_they_filled(evaluations):
    assert "filled" not in format_table(evaluations)
    flops = Flops(4.0e6, 2.0e6, filled=2.5e6, several_sizes=True)
    sized = Evaluation(RoutingSetting(1.05, 2, True), 200, 0.875, 0.99, 0.4, 1.05, 0.0, 0.0, flops, 2.0, 3.0e6)
    header, _, *lines = format_table([sized, *evaluations]).splitlines()
    assert header.split()[-4:] == ["MFLOPs", "filled", "vs", "dense"]
    # Of all images, not of the first batch.
    assert [line.split()[-3:] for line in lines[:2]] == [["4.00", "3.00", "2.000"], ["4.00", "-", "2.000"]]


def test_csv_and_json_hold_the_same_numbers(evaluations, tmp_path):
    write_csv(evaluations, tmp_path / "results.csv")
    write_json(evaluations, tmp_path / "results.json")
    from_json = json.loads((tmp_path / "results.json").read_text())
    with open(tmp_path / "results.csv", newline="") as file:
        from_csv = list(csv.DictReader(file))
    assert from_json[0]["batch_priority"] is True
    assert from_json[1]["capacity_factor"] is None
    assert from_json[0]["relative_flops"] == 2.0
    for plain, text in zip(from_json, from_csv):
        assert {name: "" if value is None else str(value) for name, value in plain.items()} == text


def test_columns_are_aligned():
    rows = [("", "K", "top-1 %"), ("present", "2", "9.25"), ("x", "10", "10.00")]
    assert aligned(rows, left=1) == [
        "          K  top-1 %",
        "-------  --  -------",
        "present   2     9.25",
        "x        10    10.00",
    ]
    assert aligned(rows)[-1] == "      x  10    10.00"
