"""The benchmark of the loader of videos, on a small model and few short videos."""

import json

import pytest

from benchmarks.models import video_loader
from benchmarks.models.video_loader import LOADER, MODEL, main, run, write_videos
from tests.tiny_video import NAME
from vmoe_torch.data import VideoFolder


def test_videos_are_of_all_classes_and_move(tmp_path):
    write_videos(tmp_path, videos=4, seconds=1, size=(32, 48))
    data = VideoFolder(tmp_path, mode="L")
    assert data.class_names == ("0", "1", "2", "3")
    assert len(data) == 4
    first, last = data[0][0].read(lambda seconds, rate: [0.0, seconds - 0.01])
    assert first.size == (48, 32)
    assert first.tobytes() != last.tobytes()


# Python 3.12 warns of every fork beside torch's threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_main_writes_both_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video_loader, "run", lambda *given: run(*given, videos=8, seconds=1))
    monkeypatch.setattr(video_loader, "environment", lambda device: {"machine": "test"})
    monkeypatch.setattr(video_loader.torch, "set_num_threads", lambda count: None)
    path = main([f"--model={NAME}", "--rounds=2", "--batch=2", "--workers=1", f"--out={tmp_path}"])
    assert path.read_text(encoding="utf-8").strip() == capsys.readouterr().out.strip()
    content = json.loads(path.with_suffix(".json").read_text())
    assert [(row["variant"], row["runs"]) for row in content["rows"]] == [(LOADER, 2), (MODEL, 2)]
    for row in content["rows"]:
        rate = content["frames_per_second"][row["variant"]]
        assert rate == pytest.approx(2 * 4 / (row["median_us"] * 1e-6))
