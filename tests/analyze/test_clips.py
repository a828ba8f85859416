"""Analyses of models of videos: which patches of which frames, and where in a clip experts work."""

import io
import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import randomized
from tests.tiny_video import video_model
from tests.videos import write_video
from vmoe_torch.analyze import (
    analyze,
    collect_kept_patches,
    collect_routing,
    describe_model,
    kept_choices_per_patch,
    kept_clips_animation,
    shares_of_patches,
)
from vmoe_torch.analyze.patches import pictures_of
from vmoe_torch.control import routing
from vmoe_torch.data import ClipTiming, ClipTransform, VideoFolder
from vmoe_torch.report.style import HIDDEN
from vmoe_torch.train import build_transforms
from vmoe_torch.train.config import DataConfig


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos of two classes, every frame a grey of its own."""
    folder = tmp_path_factory.mktemp("videos")
    for name in "ab":
        for number in range(2):
            write_video(folder / name / f"{number}.mkv", 8)
    return VideoFolder(folder)


@pytest.fixture
def model():
    return randomized(video_model(num_classes=2))


def transform_of(model):
    return build_transforms(DataConfig(name="video", crop_mode="center", frame_stride=1), model)[1]


def test_kept_choices_are_those_of_the_record_by_time_row_and_column(model):
    clips = torch.randn(3, 3, 4, 32, 48)
    with routing(model, capacity_factor=0.4, batch_priority=True):
        maps = kept_choices_per_patch(model, clips)
    assert list(maps) == ["blocks.0.mlp", "blocks.1.mlp"]
    for name, found in maps.items():
        assert found.shape == (3, 2, 4, 6)
        slots = model.get_submodule(name).record.slots
        for clip, time, row, column in product(range(3), range(2), range(4), range(6)):
            token = ((clip * 2 + time) * 4 + row) * 6 + column
            assert found[clip, time, row, column] == int((slots[token] >= 0).sum())
    assert 0 < int((maps["blocks.0.mlp"] == 0).sum()) < 3 * 48


def test_places_are_counted_over_all_times(model):
    clips, labels = torch.randn(3, 3, 4, 32, 48), torch.tensor([0, 1, 1])
    found = collect_routing(model, [(clips, labels)], 2)["blocks.1.mlp"]
    record = model.blocks[1].mlp.record
    want = torch.zeros(4, 6, 4, dtype=torch.int64)
    for token, (slots, experts) in enumerate(zip(record.slots.tolist(), record.experts.tolist())):
        row, column = divmod(token % 24, 6)
        for slot, expert in zip(slots, experts):
            want[row, column, expert] += slot >= 0
    assert torch.equal(found.positions, want)
    assert torch.equal(found.positions.sum((0, 1)), found.kept.sum(0))


def test_pictures_are_the_frames_as_they_were(videos, model):
    transform = transform_of(model)
    video, _ = videos[0]
    (pictures,) = pictures_of(transform(video).unsqueeze(0), transform)
    # Four frames in the middle of eight.
    frames = video.read(lambda seconds, rate: [(2.5 + i) / rate for i in range(4)])
    want = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])) / 255
    assert pictures.shape == (4, 32, 48, 3)
    torch.testing.assert_close(pictures, want, atol=1 / 254, rtol=0)


def test_animation_plays_the_clips_and_hides_what_no_expert_processed(videos, model):
    patches = collect_kept_patches(model, videos, transform_of(model), ("a", "b"), (1.0, 0.3), count=2)
    assert patches.of_clips
    assert patches.pictures.shape == (2, 4, 32, 48, 3)
    kept = patches.kept["blocks.1.mlp"]
    assert kept.shape == (2, 2, 2, 2, 4, 6)
    data = kept_clips_animation(patches, "blocks.1.mlp", (1.0, 0.3), "title", side=96)
    pale = (255 * torch.tensor(HIDDEN)).round().int()
    with Image.open(io.BytesIO(data)) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)
        for time in range(4):
            gif.seek(time)
            pixels = torch.from_numpy(np.array(gif.convert("RGB"))).int()
            # As `kept_clips_animation` lays them out: 64 pixels high, 96 wide, two rows to a clip.
            for clip, order, column in product(range(2), range(2), range(2)):
                x, y = 78 + (column + 1) * 104, 78 + clip * (2 * 82 + 16) + order * 82
                for row, place in product(range(4), range(6)):
                    pixel = pixels[y + 16 * row + 8, x + 16 * place + 8]
                    hidden = int((pixel - pale).abs().max()) <= 8
                    assert hidden == (int(kept[column, order, clip, time // 2, row, place]) == 0)


def test_report_of_a_model_of_videos(videos, model, tmp_path):
    assert "patches of 2 x 8 x 8 pixels" in describe_model(model)
    analysis = analyze(model, videos, transform_of(model), "ab", capacity_factors=(1.0, 0.5), batch_size=3, pictures=2)
    page = analysis.write(tmp_path).read_text(encoding="utf-8")
    assert "Which patches of which frames each capacity keeps" in page
    assert "Every clip is a group of its own" in page
    found = json.loads((tmp_path / "report.json").read_text())
    (shares,) = {len(share) for share in found["kept_patches"]["share"]["blocks.1.mlp"]["bpr"]}
    assert shares == 2
    assert list(tmp_path.rglob("clips.gif"))


@pytest.mark.parametrize(("router", "figure"), [("expert_choice", "experts_per_patch"), ("soft", "slots")])
def test_report_of_a_model_of_videos_without_choices(videos, tmp_path, router, figure):
    model = randomized(video_model(num_classes=2, router=router))
    analysis = analyze(model, videos, transform_of(model), "ab", batch_size=3, pictures=2)
    # The third frame of four: the middle one of two layers in time begins there.
    transform = transform_of(model)
    clips = torch.stack([transform(videos[index][0]) for index in (0, 2)])
    assert torch.equal(analysis.pictures, pictures_of(clips, transform)[:, 2])
    assert {shares.shape[-2:] for shares in analysis.patches.values()} == {(4, 6)}
    want = shares_of_patches(model, clips)["blocks.1.mlp"]
    assert torch.equal(analysis.patches["blocks.1.mlp"], want[..., 1, :, :])
    page = analysis.write(tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / f"{figure}.png").exists()
    assert "4 experts" in page


def test_image_transform_of_a_clip_may_tell_no_normalisation():
    transform = ClipTransform(lambda image: image, ClipTiming(2))
    (pictures,) = pictures_of(torch.tensor([[[[[-3.0]], [[1.0]]]]]), transform)
    assert pictures.flatten().tolist() == [0.0, 1.0]
