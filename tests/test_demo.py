"""The demo from end to end, with a few updates and images."""

import csv
import errno
import os

import pytest

from tests.helpers.browser import browser_test, check_page
from vmoe_torch import demo
from vmoe_torch.analyze import analysis

# Python 3.12 warns of every fork beside torch's threads; a process of the demo loads its images.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
ARGUMENTS = ["--epochs", "1", "--max-updates", "2", "--test-images", "16"]
# Two curves, an animation, loads, gates, random routers, numbers of experts; and three for each of three layers.
PICTURES = 7 + 3 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    report = demo.main(["--out", str(folder), *ARGUMENTS])
    assert report == folder / "report.html"
    return folder


def test_demo_writes_the_report_and_its_numbers(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list(folder.glob("*.png"))) == PICTURES - 1
    assert page.count("data:image/gif;base64,") == len(list(folder.glob("*.gif"))) == 1
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["num_selected_experts"], row["capacity_factor"], row["batch_priority"]) for row in rows} == {
        (selected, capacity, priority)
        for selected in ("1", "2")
        for capacity in ("1.05", "0.5", "0.25", "0.1")
        for priority in ("True", "False")
    }
    for row in rows:
        assert row["images"] == "16"
        # The demo asks for capacities that its groups hold, to a slot of the expert.
        assert float(row["actual_capacity_factor"]) == pytest.approx(float(row["capacity_factor"]), abs=0.021)
        assert f"{float(row['flops']) / 1e6:#.4g}" in page
    assert (folder / "train" / "checkpoints").is_dir()


@browser_test
def test_demo_report_opens_in_a_browser(folder, tmp_path):
    check_page(folder / "report.html", tmp_path, PICTURES)


def test_demo_run_again_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    # Drawing is most of the time.
    monkeypatch.setattr(analysis, "write_report", lambda report, out: out / "report.html")
    before = sorted((folder / "train" / "checkpoints").iterdir())
    results = (folder / "results.csv").read_text()
    demo.main(["--out", str(folder), *ARGUMENTS])
    assert sorted((folder / "train" / "checkpoints").iterdir()) == before
    assert (folder / "results.csv").read_text() == results
    printed = capsys.readouterr().out
    assert printed.count("vanilla") == printed.count("BPR") == 8
    assert str(folder / "report.html") in printed


def test_demo_keeps_the_seconds_whole(tmp_path, monkeypatch):
    clock = tmp_path / "train_seconds.txt"
    # As a full disk left it.
    clock.write_text("")
    monkeypatch.setattr(demo, "train", lambda config, resume: "result")
    assert demo.timed_train(demo.CONFIG, clock)[0] == "result"
    clock.write_text("7.5\n")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"clock .* cannot be written: No space left on device"):
        demo.timed_train(demo.CONFIG, clock)
    assert clock.read_text() == "7.5\n"
    assert list(tmp_path.iterdir()) == [clock]


def test_demo_refuses_bad_options_before_training(tmp_path):
    for options, message in (
        (["--test-images", "0"], "--test-images must be at least 1, got 0"),
        (["--epochs", "0"], "schedule.epochs must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.main(["--out", str(tmp_path), *options])
    assert not (tmp_path / "train").exists()


def test_demo_refuses_to_mix_runs(folder):
    with pytest.raises(ValueError, match=r"schedule.epochs must be that of the run to resume"):
        demo.main(["--out", str(folder), "--epochs", "2"])
