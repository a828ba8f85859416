"""Clips of videos: which frames they have, by seed alone, and transforms that treat all their frames alike."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from tests.videos import number_of, write_video
from vmoe_torch.data import (
    ClipTiming,
    ClipTransform,
    EpochSampler,
    Video,
    VideoFolder,
    evaluation_loader,
    training_loader,
)
from vmoe_torch.data.clips import alike

EVALUATION = create_transform((3, 32, 32), crop_pct=1.0)
# Everything random that a run may ask of timm's.
AUGMENTED = create_transform(
    (3, 32, 32), is_training=True, color_jitter=0.4, auto_augment="3a", re_prob=1.0, re_mode="pixel", scale=(0.2, 1.0)
)
RANDAUGMENT = create_transform((3, 32, 32), is_training=True, auto_augment="rand-m9-n3-mstd0.5", color_jitter=None)


def raw(image):
    """Grey levels in 0..255."""
    return pil_to_tensor(image).float()


def numbers(clip):
    """The number of each frame of a clip (C, T, H, W) in 0..255."""
    return [number_of(frame) for frame in clip.unbind(1)]


@pytest.fixture
def folder(tmp_path):
    """Two classes with six videos of 20 frames each."""
    for name in "ab":
        for number in range(6):
            write_video(tmp_path / name / f"{number}.avi", 20)
    return tmp_path


@pytest.mark.parametrize(
    ("timing", "want"),
    [
        (ClipTiming(4), [8, 9, 10, 11]),
        (ClipTiming(4, 2), [6, 8, 10, 12]),
        (ClipTiming(5, 4), [1, 5, 9, 13, 17]),
        (ClipTiming(3, fps=4), [7, 9, 11]),
        (ClipTiming(3, 7, fps=4), [7, 9, 11]),
        (ClipTiming(3, fps=16), [9, 10, 10]),
        (ClipTiming(1), [9]),
        # Longer than the video, which stands still at its end.
        (ClipTiming(6, 5), [0, 5, 10, 15, 19, 19]),
    ],
)
def test_clip_in_the_middle(tmp_path, timing, want):
    clip = ClipTransform(raw, timing)(Video(str(write_video(tmp_path / "a.avi", 20)), "L"))
    assert clip.shape == (1, len(want), 32, 48)
    assert numbers(clip) == want


def test_clips_at_random_are_within_the_video_and_of_all_its_parts(tmp_path):
    video = Video(str(write_video(tmp_path / "a.avi", 20)), "L")
    transform = ClipTransform(raw, ClipTiming(4, 3), clips=None)
    random.seed(0)
    clips = [numbers(transform(video)) for _ in range(80)]
    assert all(np.diff(clip).tolist() == [3, 3, 3] for clip in clips)
    assert {clip[0] for clip in clips} == set(range(11))


def test_views_are_clips_from_the_first_frame_to_the_last_and_crops_along_the_longer_side(tmp_path):
    wide = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (32, 1))
    video = Video(str(write_video(tmp_path / "a.mkv", [wide] * 20)))
    one = ClipTransform(EVALUATION, ClipTiming(4))
    views = one.views(clips=3, crops=3)
    assert (views.num_views, one.num_views) == (9, 1)
    many = views(video)
    assert many.shape == (9, 3, 4, 32, 32)
    # The middle of the middle is what one view is.
    assert torch.equal(many[4], one(video))
    left, middle, right = (many[number].mean() for number in range(3))
    assert left < middle < right
    high = Video(str(write_video(tmp_path / "b.mkv", [wide.T.copy()] * 20)))
    assert torch.allclose(views(high), many.transpose(-1, -2), atol=1e-6)
    grey = ClipTransform(raw, ClipTiming(4)).views(3, 1)(Video(str(write_video(tmp_path / "c.avi", 20)), "L"))
    assert [numbers(clip)[0] for clip in grey] == [0, 8, 16]
    # With more clips than places they come again.
    short = Video(str(write_video(tmp_path / "d.avi", 5)), "L")
    assert [numbers(clip)[0] for clip in ClipTransform(raw, ClipTiming(4)).views(4, 1)(short)] == [0, 0, 1, 1]


@pytest.mark.parametrize("transform", [AUGMENTED, RANDAUGMENT], ids=["3a", "rand"])
def test_every_frame_is_transformed_alike_and_as_an_image_is(transform):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    other = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8))

    def seeded(function, *arguments):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        return function(*arguments)

    clip = seeded(alike, transform, [image, other, image])
    assert torch.equal(clip[:, 0], clip[:, 2])
    for number, frame in ((0, image), (1, other)):
        assert torch.equal(clip[:, number], seeded(transform, frame))
    # The draws go on after a clip as after an image.
    after = seeded(lambda: [alike(transform, [image] * 3), torch.rand(1), random.random(), np.random.rand()][1:])
    assert after == seeded(lambda: [transform(image), torch.rand(1), random.random(), np.random.rand()][1:])
    seeded(alike, transform, [image])
    assert not torch.equal(alike(transform, [image])[:, 0], clip[:, 0])


# Python 3.12 warns of every fork beside torch's threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_clips_depend_on_seed_epoch_and_video_alone(folder):
    data = VideoFolder(folder, mode="L")
    transform = ClipTransform(raw, ClipTiming(3, 2), clips=None)

    def batches(epoch, update, workers=0, seed=0):
        sampler = EpochSampler(12, 4, seed=seed)
        sampler.set_position(epoch, update)
        return [(clips, labels) for clips, labels in training_loader(data, transform, sampler, workers, False)]

    whole = batches(1, 0)
    assert all(clips.shape == (4, 1, 3, 32, 48) for clips, _ in whole)
    assert len({tuple(numbers(clip)) for clips, _ in whole for clip in clips}) > 4
    torch.rand(3)
    random.random()
    for got in (batches(1, 1), batches(1, 1, workers=2)):
        for (clips, labels), (want, want_labels) in zip(got, whole[1:], strict=True):
            assert torch.equal(clips, want)
            assert torch.equal(labels, want_labels)
    for other in (batches(2, 0), batches(1, 0, seed=1)):
        assert not torch.equal(torch.cat([clips for clips, _ in other]), torch.cat([clips for clips, _ in whole]))


def test_broken_videos_are_named_counted_and_replaced(folder):
    for name in ("a/1.avi", "b/2.avi"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    data = VideoFolder(folder, mode="L")
    transform = ClipTransform(raw, ClipTiming(3), clips=None)

    def clips(most, warned=None):
        loader = training_loader(data, transform, EpochSampler(12, 4, seed=0), 0, False, max_broken=most)
        loader.warn = (warned if warned is not None else []).append
        return [batch for batch, _ in loader]

    warned = []
    got = clips(2, warned)
    assert [len(batch) for batch in got] == [4, 4, 4]
    assert {line.split("/")[-1].split(" ")[0] for line in warned} == {"1.avi", "2.avi"}
    assert warned[0].startswith("video ")
    assert warned[1].endswith("skipped, 2 of data.max_broken=2")
    assert all(torch.equal(a, b) for a, b in zip(got, clips(2)))
    with pytest.raises(ValueError, match=r"data.max_broken must be at least .* 2 so far: video .*avi cannot be read"):
        clips(1)
    for option, counts in ((None, [12]), ("max_broken", [10])):
        loader = evaluation_loader(data, ClipTransform(raw, ClipTiming(3)), 12, 0, False, max_broken=2, option=option)
        assert [len(labels) for _, labels in loader] == counts
        labels = torch.cat([labels for _, labels in loader])
        assert int((labels >= 0).sum()) == 10


def test_model_says_what_clips_it_takes():
    model = SimpleNamespace(num_frames=16, tubelet_size=2, pretrained_cfg={"frame_stride": 4})
    assert ClipTiming.of(model) == ClipTiming(16, 4)
    assert ClipTiming.of(model, 8, 2) == ClipTiming(8, 2)
    assert ClipTiming.of(model, fps=7.5) == ClipTiming(16, 4, 7.5)
    assert ClipTiming.of(SimpleNamespace(), 5) == ClipTiming(5, 1)
    assert ClipTiming.of(SimpleNamespace(num_frames=9, tubelet_size=(3, 16, 16))) == ClipTiming(9, 1)
    with pytest.raises(ValueError, match="frames must be a multiple of the model's tubelets of 2 frames, got 5"):
        ClipTiming.of(model, 5)
    with pytest.raises(ValueError, match="model must be one of videos, or frames given, got SimpleNamespace"):
        ClipTiming.of(SimpleNamespace())


def test_what_is_no_clip_is_refused():
    for wrong, said in (
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"frames": 1.5}, r"frames must be a whole number, got 1\.5"),
        ({"frames": "a"}, "frames must be a whole number, got 'a'"),
        ({"frames": 2, "frame_stride": 0.0}, "frame_stride must be above 0, got 0.0"),
        ({"frames": 2, "frame_stride": float("nan")}, "frame_stride must be above 0, got nan"),
        ({"frames": 2, "fps": -1.0}, "fps must be above 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            ClipTiming(**wrong)
    one = ClipTransform(EVALUATION, ClipTiming(2))
    with pytest.raises(ValueError, match="clips must be at least 1, got 0"):
        one.views(0, 1)
    with pytest.raises(ValueError, match="crops must be at least 1, got 0"):
        one.views(1, 0)
    squashed = create_transform((3, 32, 32), crop_pct=1.0, crop_mode="squash")
    for transform in (raw, squashed):
        with pytest.raises(ValueError, match=r"crops must be 1 for a transform without a center crop .*, got 3"):
            ClipTransform(transform, ClipTiming(2)).views(1, 3)
