"""A run on videos: what it learns, goes on exactly after a stop, and says of videos that are broken."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny_video import NAME
from tests.videos import write_video
from vmoe_torch.data import ClipTiming
from vmoe_torch.train import Config, build_model, build_transforms, train
from vmoe_torch.train.idle_keys import idle
from vmoe_torch.train.record.table import read_table


def moving(step: int) -> list[np.ndarray]:
    """A bar that moves up or down, from anywhere: every frame alone is of either class."""
    begin = np.random.default_rng(abs(step)).integers(0, 32)
    frames = np.zeros((8, 32, 48), np.uint8)
    for number in range(8):
        frames[number, (begin + 4 * np.sign(step) * number) % 32] = 255
    return list(frames)


@pytest.fixture
def config(tmp_path):
    """Two epochs of 12 videos in two classes; 4 to validate on."""
    for split, count in (("train", 6), ("val", 2)):
        for name, sign in (("up", -1), ("down", 1)):
            for number in range(1, count + 1):
                write_video(tmp_path / "videos" / split / name / f"{number}.avi", moving(sign * number))
    return Config.from_dict(
        {
            "model": {"name": NAME, "kwargs": {"in_chans": 1}},
            "data": {
                "name": "video",
                "root": str(tmp_path / "videos"),
                "batch_size": 4,
                "frame_stride": 1,
                "scale": (0.5, 1.0),
                "random_erasing": 0.5,
                "mixup": 0.2,
                "cutmix": 0.5,
            },
            "optim": {"lr": 3e-3},
            "schedule": {"epochs": 2},
            "run": {
                "output": str(tmp_path / "run"),
                "device": "cpu",
                "progress": False,
                "tensorboard": False,
                "log_every": 1,
            },
        }
    )


# Python 3.12 warns of every fork beside torch's threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_run_goes_on_exactly_whatever_the_workers(config, tmp_path):
    whole = train(config)
    assert whole.class_names == ("down", "up")
    assert whole.finished
    stopped = config.override(f"run.output={tmp_path}/stopped", "data.workers=1")
    assert not train(stopped.override("run.max_updates=2")).finished
    resumed = train(stopped, resume=True)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "12 videos in 2 classes" in (tmp_path / "run" / "summary.html").read_text(encoding="utf-8")


def test_broken_videos_are_replaced_named_and_counted(config, tmp_path):
    for name in ("train/up/3.avi", "val/down/2.avi"):
        path = tmp_path / "videos" / name
        path.write_bytes(path.read_bytes()[:200])
    result = train(config.override("data.max_broken=1", "schedule.epochs=1"))
    alarms = [row for row in read_table(Path(config.run.output) / "alarms.csv") if row["kind"] == "broken video"]
    assert len(alarms) == 2
    for alarm, name in zip(alarms, ("train/up/3.avi", "val/down/2.avi")):
        assert name in alarm["message"]
        assert alarm["message"].startswith("video ")
        assert alarm["message"].endswith("skipped, 1 of data.max_broken=1")
    assert result.history[0]["val_accuracy"] in [pytest.approx(right / 3) for right in range(4)]
    with pytest.raises(ValueError, match=r"max_broken must be at least .*, 1 so far: video .*3\.avi cannot be read"):
        train(config.override(f"run.output={tmp_path}/none"))


def test_cut_and_mixed_clips_are_so_in_all_frames_alike(config):
    from vmoe_torch.train.build import build_mixup

    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 6, 32, 48).contiguous()
    mixup = build_mixup(config.override("data.mixup=0", "data.cutmix=1.0"), 2)
    np.random.seed(0)
    seen = set()
    for _ in range(8):
        mixed, _ = mixup(clips.clone().flatten(1, -3), torch.tensor([0, 1, 0, 1]))
        mixed = mixed.view_as(clips)
        assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
        seen.add(len(mixed[0].unique()))
    assert 2 in seen


def test_transforms_say_which_clips_the_model_takes(config):
    model = build_model(config.model, 2)
    training, evaluation = build_transforms(config.data, model)
    assert (training.clips, evaluation.clips, evaluation.num_views) == (None, 1, 1)
    assert evaluation.timing == ClipTiming(4, 1)
    for changes, want in (
        (("data.frame_stride=null",), ClipTiming(4, 2)),
        (("data.frames=2",), ClipTiming(2, 1)),
        (("data.fps=6",), ClipTiming(4, 2, 6)),
    ):
        assert build_transforms(config.override(*changes).data, model)[1].timing == want
    with pytest.raises(ValueError, match=r"^data.name=video: frames must be a multiple .* of 2 frames, got 3"):
        build_transforms(config.override("data.frames=3").data, model)
    with pytest.raises(ValueError, match=r"^data.name=video: model must be one of videos, or frames given, got Linear"):
        build_transforms(config.data, nn.Linear(1, 1))


def test_keys_of_videos(config):
    assert {"data.exif"} <= idle(config).keys()
    assert not {"data.frames", "data.frame_stride", "data.fps"} & idle(config).keys()
    assert "data.frame_stride" in idle(config.override("data.fps=4"))
    assert {"data.frames", "data.frame_stride", "data.fps"} <= idle(Config()).keys()
    for change, said in (
        ("data.frames=0", "data.frames must be at least 1, got 0"),
        ("data.frame_stride=0", "data.frame_stride must be above 0 and finite, got 0.0"),
        ("data.fps=-1", "data.fps must be above 0 and finite, got -1.0"),
        ("data.root=null", "data.root must name the folder of videos for data.name=video, got none"),
        ("data.exif=true", "data.exif must be false, its default, with data.name=video"),
    ):
        with pytest.raises(ValueError, match=said):
            config.override(change).check()
