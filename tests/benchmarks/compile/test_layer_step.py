"""The table of a layer's launches: what is committed is of today's launches, and got no worse."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.compile import layer_step
from benchmarks.compile.report import Compiled, compile_case, versions


def _committed(part: str) -> list[dict]:
    return json.loads(layer_step.FILE.read_text())[part]


@pytest.mark.parametrize("chip", layer_step.CHIPS)
def test_what_is_committed_is_of_todays_launches(chip):
    forward, backward = layer_step.launches(chip)
    now = [("forward", each) for each in forward] + [("backward", each) for each in backward]
    rows = [row for row in _committed("after") if row["chip"] == chip]
    assert [(row["direction"], row["kernel"]) for row in rows] == [(direction, each.name) for direction, each in now]
    for row, (_, each) in zip(rows, now):
        assert row["programs"] == layer_step.programs(each)


def test_what_is_committed_got_no_worse():
    counts = {
        part: [
            sum(row["direction"] == each and row["chip"] == 90 for row in _committed(part))
            for each in ("forward", "backward")
        ]
        for part in ("before", "after")
    }
    assert counts["after"][0] <= min(6, counts["before"][0])
    assert counts["after"][1] <= min(11, counts["before"][1])
    before = {(row["kernel"], row["chip"]): row for row in _committed("before")}
    for row in _committed("after"):
        assert row["stack"] == row["local"] == 0
        old = before[row["kernel"], row["chip"]]
        if "bounds_us" in row:
            assert max(row["bounds_us"].values()) <= max(old["bounds_us"].values())


def test_rows_are_what_a_launch_compiles_to():
    content = json.loads(layer_step.FILE.read_text())
    if content["versions"]["triton"] != versions()["triton"]:
        pytest.skip(f"the table is of Triton {content['versions']['triton']}, another may compile otherwise")
    forward, _ = layer_step.launches(90)
    made = compile_case(next(each for each in forward if each.name == "combine"), 90)
    row = next(row for row in content["after"] if (row["kernel"], row["chip"]) == ("combine", 90))
    assert [row[name] for name in ("registers", "shared", "blocks_per_sm")] == [
        *(made.registers, made.shared, made.blocks_per_sm)
    ]


def test_router_times_count_every_step_once():
    (launch, *_), _ = layer_step.launches(90)
    case = layer_step.CASE
    blocks = {"BLOCK_T": 64, "BLOCK_E": 32, "BLOCK_D": 64}
    launch = replace(launch, constexprs={**launch.constexprs, **blocks}, grid=(392,), num_warps=4)
    made = Compiled("router", 90, 4, 1, *[0] * 8, 0, 0, True, 0, 0, 1, step=100, instructions=1100)
    times = layer_step.router_times(launch, made)
    steps = case.num_tokens // 64 * (case.width // 64)
    assert times["issue"] == round(4 * (100 * steps + 392 * 1000) / (132 * 4 * 1.83e9) * 1e6, 1)
    assert times["memory"] == pytest.approx(case.num_tokens * case.width * 2 / 4.3e12 * 1e6, rel=0.1)
