"""Clips of moving characters: each motion is what its name says, and its pair is the same backwards."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.studies.motion.__main__ import main
from benchmarks.studies.motion.draw import MOTIONS, class_name, moving_glyph
from vmoe_torch.data import ClipTiming, ClipTransform, VideoFolder, open_data

FACES = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def clip(motion, seed=0, **changes):
    """Of an L, which no turn and no mirror makes itself."""
    glyph = np.zeros((64, 64), np.uint8)
    glyph[8:56, 20:28] = glyph[48:56, 20:44] = 255
    return moving_glyph(glyph, motion, np.random.default_rng(seed), **changes).astype(float)


def centre(frames):
    """Column of the middle of the ink, frame by frame."""
    return (frames.sum(1) * np.arange(frames.shape[2])).sum(1) / frames.sum((1, 2))


def direction(frame):
    """Degrees clockwise of the ink's long axis from the vertical."""
    rows, columns = np.nonzero(frame > 64)
    (_, _), vectors = np.linalg.eigh(np.cov(columns, rows))
    across, down = vectors[:, 1] * np.sign(vectors[1, 1])
    return np.rad2deg(np.arctan2(-across, down))


@pytest.mark.parametrize("seed", range(4))
def test_every_motion_is_what_it_is_called(seed):
    assert (np.diff(centre(clip("right", seed))) > 0).all()
    # Ink is an area.
    assert clip("grow", seed)[-1].sum() > 1.5 * clip("grow", seed)[0].sum()
    ink = clip("reveal", seed).sum((1, 2))
    assert (np.diff(ink) >= 0).all()
    assert ink[0] < 0.4 * ink[-1]
    turning = clip("clockwise", seed, side=64)
    assert (np.diff([direction(frame) for frame in turning[6:10]]) > 0).all()


@pytest.mark.parametrize("first", range(0, 8, 2))
def test_pairs_are_each_other_backwards_and_clips_differ(first):
    forwards, backwards = (clip(motion, frames=5, side=24) for motion in MOTIONS[first : first + 2])
    assert forwards.shape == (5, 24, 24)
    assert np.array_equal(forwards, backwards[::-1])
    assert not np.array_equal(forwards, backwards)
    assert not np.array_equal(forwards, clip(MOTIONS[first], 1, frames=5, side=24))
    assert np.array_equal(forwards, clip(MOTIONS[first], frames=5, side=24))


def test_study_writes_splits_that_are_read_back_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, name in (("train", "DejaVuSans"), ("val", "STIXGeneral")):
        (tmp_path / "fonts" / split).mkdir(parents=True)
        shutil.copy(FACES / f"{name}.ttf", tmp_path / "fonts" / split)
    main([str(tmp_path / "fonts"), str(tmp_path / "clips"), "--characters=A§", "--clips=2", "--frames=6", "--side=20"])
    assert "32 clips of 2 characters, 8 motions" in capsys.readouterr().out
    train, val = (open_data("video", tmp_path / "clips", split, mode="L") for split in ("train", "val"))
    assert isinstance(train, VideoFolder)
    assert set(train.class_names) == set(val.class_names) == {class_name(m, c) for m in MOTIONS for c in "A§"}
    assert len(train) == len(val) == 32
    whole = ClipTransform(pil_to_tensor, ClipTiming(6))
    by_name = {Path(video.path).relative_to(tmp_path): whole(video)[0] for video, _ in train}
    for name in ("A", "u00a7"):
        left, right = (by_name[Path(f"clips/train/{motion}-{name}/0-1.mkv")] for motion in ("left", "right"))
        assert left.shape == (6, 20, 20)
        assert (left == right.flip(0)).all()
        assert (left != right).any()
    one, other = (by_name[Path(f"clips/train/grow-A/0-{number}.mkv")] for number in range(2))
    assert (one != other).any()


def test_what_is_no_motion_is_refused():
    with pytest.raises(ValueError, match=r"motion must be one of right, left, .*, got 'fly'"):
        clip("fly")
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        clip("left", frames=1)
