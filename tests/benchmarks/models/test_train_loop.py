"""The loop's benchmark: it refuses a loop that trains otherwise, and writes what it says it writes."""

import json

import pytest
import torch

from benchmarks.models import train_loop
from benchmarks.models.train_loop import CONFIG, OURS, check_loops, main, run, synthetic_images
from vmoe_torch.train.step import Update

CPU = torch.device("cpu")
# Python 3.12 warns of every fork beside torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def small():
    return CONFIG.override(
        "data.batch_size=8",
        'model.kwargs={"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 1,'
        ' "moe_layers": "last1", "num_experts": 2}',
        "run.progress=false",
        "run.device=cpu",
    )


def test_run_times_both_loops_and_the_waiting(small):
    content = run(small, CPU, rounds=2, updates=2)
    text = "\n".join(train_loop.markdown(content))
    assert json.loads(json.dumps(content)) == content
    assert [row["variant"] for row in content["rows"]] == ["bare", OURS, "whole update", "of that, waiting"]
    assert [row["runs"] for row in content["rows"]] == [2, 2, 4, 4]
    assert all(row["median_us"] > 0 for row in content["rows"])
    assert content["bars"][0]["limit"] == pytest.approx(1 / 0.95)
    assert 0 < content["bars"][1]["measured"] < 1
    assert all(bar["what"] in text for bar in content["bars"])


def test_loop_that_trains_otherwise_is_not_timed(small, monkeypatch):
    clipped = Update.__init__

    def unclipped(self, *arguments):
        clipped(self, *arguments)
        self.clip_norm = 1e-3

    monkeypatch.setattr(Update, "__init__", unclipped)
    with pytest.raises(RuntimeError, match=r"must be within 1e-5 of the bare loop's, got .*: nothing is timed"):
        check_loops(small, synthetic_images(small), CPU)


def test_main_writes_both_files(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_loop, "CONFIG", small)
    threads = torch.get_num_threads()
    try:
        path = main(["--rounds", "1", "--updates", "1", "--threads", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert path.read_text(encoding="utf-8").strip() == capsys.readouterr().out.strip()
    assert json.loads(path.with_suffix(".json").read_text())["bars"]
