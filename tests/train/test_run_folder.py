"""What a run leaves for people: tables over time, TensorBoard, and a page with curves."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.browser import browser_test, check_page
from vmoe_torch.train import train
from vmoe_torch.train.record.logs import Logs
from vmoe_torch.train.record.meter import Meter
from vmoe_torch.train.record.summary import write_summary
from vmoe_torch.train.record.table import CsvTable, read_table


@pytest.fixture
def folder(tiny):
    """Of a short run that writes everything, with an alarm that always sounds."""
    config = tiny.override(
        "run.tensorboard=true", "run.summary=true", "run.max_updates=8", "alarms.expert_share=0.1", "run.log_every=3"
    )
    train(config)
    return Path(config.run.output)


def test_run_folder_tells_of_the_routing_over_time(folder):
    rows = read_table(folder / "routing.csv")
    assert [row["update"] for row in rows] == ["3", "5", "6"]
    for row in rows:
        assert row["layer"] == "blocks.1.mlp"
        loads = [float(row[f"load_{expert}"]) for expert in range(4)]
        assert sum(loads) == pytest.approx(1.0)
        assert float(row["max_load"]) == pytest.approx(4 * max(loads))
        assert 0 <= float(row["dropped"]) < 1
        assert float(row["importance_cv"]) >= 0
    points = read_table(folder / "progress.csv")
    assert [row["update"] for row in points] == ["3", "5", "6"]
    assert all(float(row["loss"]) > 0 and float(row["gradient_norm"]) > 0 for row in points)
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"train/loss", "val/accuracy", "val/ema_accuracy", "routing/blocks.1.mlp/dropped"} <= set(tags)
    shares = [board.Scalars(f"load/blocks.1.mlp/expert_{expert}")[0].value for expert in range(4)]
    assert shares == pytest.approx([float(rows[0][f"load_{expert}"]) for expert in range(4)])


def test_run_folder_has_a_page_with_curves_and_alarms(capfd, folder):
    (alarm,) = read_table(folder / "alarms.csv")
    assert f"warning: update 3: collapse: blocks.1.mlp: {alarm['message']}" in capfd.readouterr().err
    assert (alarm["update"], alarm["kind"], alarm["layer"]) == ("3", "collapse", "blocks.1.mlp")
    page = (folder / "summary.html").read_text(encoding="utf-8")
    for text in ("Loss", "Accuracy", "Learning rate", "Images per second", "Load per expert over time", "dropped"):
        assert text in page
    assert alarm["message"] in page
    # Loss, accuracy, learning rate, speed, drops, importance, load of the one layer.
    assert page.count("data:image/png;base64,") == 7
    assert json.loads((folder / "config.json").read_text())["alarms"]["expert_share"] == 0.1
    assert not list(folder.glob(".*"))


def test_page_shows_the_first_alarms_and_counts_the_rest(folder):
    with open(folder / "alarms.csv", "a") as file:
        file.writelines(f"9,loss spike,,number {number}\n" for number in range(52))
    page = write_summary(folder).read_text(encoding="utf-8")
    assert "53 alarms." in page
    assert "The first 50; alarms.csv has 3 more." in page
    assert "number 48<" in page
    assert "number 49<" not in page


@browser_test
def test_page_opens_in_a_browser(folder, tmp_path):
    with open(folder / "alarms.csv", "a") as file:
        file.write(f"9,broken image,,image {'long/' * 60}1.png cannot be read\n")
    check_page(write_summary(folder), tmp_path, 7)


def test_meter_tells_of_the_images_since_it_was_last_asked():
    meter = Meter(torch.device("cpu"))
    for loss, label in ((1.0, 0), (3.0, 1)):
        meter.add(torch.tensor([[1.0, 0.0]]), torch.tensor([label]), torch.tensor(loss), torch.tensor(0.5))
        assert meter.recent() == {"loss": loss, "auxiliary": 0.5, "accuracy": 1.0 - label}
    assert meter.results()["loss"] == 2.0


def test_table_drops_what_comes_later_and_what_a_full_disk_cut_off(tmp_path):
    path = tmp_path / "a.csv"
    table = CsvTable(path, ("update", "loss"), 0)
    table.add({"update": 1, "loss": 0.5}, {"update": 2, "loss": None})
    table.add({"update": 3, "loss": 0.25})
    path.write_text(path.read_text() + "4")
    assert [row["update"] for row in read_table(path)] == ["1", "2", "3"]
    CsvTable(path, ("update", "loss"), 2)
    assert path.read_text().split() == ["update,loss", "1,0.5", "2,"]
    assert read_table(tmp_path / "none.csv") == []


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes nothing to the end."""

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_table_keeps_its_rows_where_the_disk_is_full(tmp_path, full_disk):
    path = tmp_path / "a.csv"
    path.write_bytes(b"update,loss\r\n1,0.5\r\n2,0.25\r\n")
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"table .*a\.csv cannot be written: No space left on device; \d+ MiB are free"):
        CsvTable(path, ("update", "loss"), 1)
    assert path.read_bytes() == before
    # Nothing to drop is nothing to write.
    CsvTable(path, ("update", "loss"), 2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_configuration_stays_where_the_disk_is_full(tiny, full_disk):
    path = Path(tiny.run.output) / "config.json"
    path.parent.mkdir()
    path.write_text("before")
    with pytest.raises(OSError, match=r"configuration .*config\.json cannot be written: No space left on device"):
        Logs(tiny, True, torch.nn.Identity(), 0, 8)
    assert path.read_text() == "before"
    assert len(list(path.parent.iterdir())) == 1
