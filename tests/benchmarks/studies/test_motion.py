"""Clips of moving characters: each motion is what it is called and its pair the same backwards; and the whole study."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.harness.results import RESULTS
from benchmarks.studies.motion import figures, formula, measure, runs
from benchmarks.studies.motion.__main__ import main as study
from benchmarks.studies.motion.clips import Clips, class_name, link_fonts
from benchmarks.studies.motion.draw import MOTIONS, moving_glyph
from benchmarks.studies.motion.files import main
from vmoe_torch.data import ClipTiming, ClipTransform, VideoFolder, open_data

ROOT = Path(__file__).parents[3]
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


def test_clips_in_memory_are_those_of_the_files(tmp_path):
    """The same clip, label and name, whether it is drawn when it is asked for or read through data.name=video."""
    fonts = link_fonts(tmp_path / "fonts")
    main([str(fonts), str(tmp_path / "clips"), "--characters=AK", "--frames=6", "--side=16"])
    clips = Clips(fonts, "val", "AK", frames=6, side=16)
    assert len(clips) == 4 * 2 * 8
    folder = open_data("video", tmp_path / "clips", "val", mode="L")
    assert len(folder) == len(clips)
    assert set(folder.class_names) == set(clips.class_names)
    read = {Path(video.path).relative_to(tmp_path / "clips" / "val"): video for video, _ in folder}
    whole = ClipTransform(pil_to_tensor, ClipTiming(6))
    for number in range(0, len(clips), 5):
        clip, label = clips[number]
        video = read[Path(clips.class_names[label]) / f"{clips.name(number)}.mkv"]
        assert np.array_equal(whole(video)[0].numpy(), clip)
        assert clips.number(*clips.place(number)) == number


def test_typefaces_to_test_on_are_never_trained_on(tmp_path):
    fonts = link_fonts(tmp_path)
    names = {split: {path.name for path in (fonts / split).iterdir()} for split in ("train", "val", "test")}
    assert "DejaVuSerif-Italic.ttf" in names["train"]
    assert names["test"] == {f"cm{kind}10.ttf" for kind in ("b", "mi", "r", "ss", "ti", "tt")}
    assert not any(name.startswith(("STIX", "cm")) for name in names["train"])
    assert names["val"].isdisjoint(names["test"] | names["train"])
    assert set(runs.CHARACTERS).isdisjoint(runs.UNSEEN_CHARACTERS)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of two letters and few updates; returns the folder of its runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"embed_dim": 24, "depth": 2, "mlp_ratio": 1.0}
    values = {"ARCHITECTURE": {**runs.ARCHITECTURE, **sizes}, "CHARACTERS": "AK", "UNSEEN_CHARACTERS": "CH"}
    values |= {"BATCH": 8, "TRAINING_CLIPS": 1, "TEST_CLIPS": 1, "EVERY": 0.0}
    for name, value in {**values, "RUNS": tuple(replace(run, updates=3) for run in runs.RUNS)}.items():
        monkeypatch.setattr(runs, name, value)
    link_fonts(tmp_path / "runs" / "fonts")
    return tmp_path / "runs"


def test_a_model_of_frames_is_blind_to_direction_and_one_of_videos_is_not(tiny):
    clips, labels = measure.whole(runs.clips_of(tiny, "test"))
    for run, blind in zip(runs.RUNS[:2], (False, True)):
        torch.manual_seed(0)
        model = runs.build(run, tiny).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        measure.set_routing(model, batch_priority=True)
        with torch.no_grad():
            forwards, backwards = (model(runs.as_input(each)) for each in (clips, clips[:, ::-1].copy()))
        assert torch.allclose(forwards, backwards, rtol=1e-3, atol=1e-3) == blind
    # Of every two clips that are each other backwards it takes one for the other.
    assert measure.accuracies(model, clips, labels)["direction"] == 0.5
    # In training it sees one frame of each tubelet.
    seen = []
    model.image.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train()(runs.as_input(clips[:2]))
    frames = runs.as_input(clips[:2]).transpose(1, 2)
    assert any(torch.equal(seen[0], frames[:, start::2].flatten(0, 1)) for start in range(2))


def test_accuracies_are_those_of_the_definition(tiny):
    """A model that always takes the right letter and, by a list, one motion or another."""
    labels = torch.arange(16)
    guesses = torch.tensor([0, 1, 2, 4, 5, 9, 6, 15])
    logits = torch.full((16, 16), -20.0)
    for label in range(16):
        logits[label, guesses[label // 2] // 2 * 2 + label % 2] = 0.0

    class Fixed(torch.nn.Module):
        def forward(self, clips):
            return logits

    found = measure.accuracies(Fixed(), np.zeros((16, 8, 32, 32), np.uint8), labels)
    motions = [int(guess) // 2 for guess in guesses]
    assert motions == [0, 0, 1, 2, 2, 4, 3, 7]
    right = [float(motion == number) for number, motion in enumerate(motions)]
    assert found["by_motion"] == right
    assert found["class"] == found["motion"] == sum(right) / 8
    assert found["pair"] == sum(motion // 2 == number // 2 for number, motion in enumerate(motions)) / 8
    ahead = sum(motion == number for number, motion in enumerate(motions)) / 8
    assert found["direction"] == ahead


def test_a_stopped_run_goes_on_bit_for_bit(tiny):
    run, data = replace(runs.RUNS[0], updates=3), runs.clips_of(tiny, "train")
    assert runs.train(run, data, tiny / "whole") > 0
    # Past its deadline it makes one update, and keeps it.
    assert [runs.train(run, data, tiny / "parts", deadline=0.0) is None for _ in range(3)] == [True, True, False]
    whole, parts = (runs.trained(run, tiny / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not torch.equal(whole["head.weight"], torch.zeros_like(whole["head.weight"]))
    rates = [runs.learning_rate(update, 1000) for update in range(1000)]
    assert max(rates) == rates[runs.WARMUP] == runs.LR
    assert rates[-1] < 1e-3 * runs.LR


def test_a_whole_study(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "GLYPHS", (0, 3, 6))
    monkeypatch.setattr("benchmarks.studies.motion.__main__.RUNS", runs.RUNS)
    where = ["--runs", str(tiny), "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    assert study([*where, "--only", "inflated"]) == 1
    assert "4 runs are left: video, frames, dense, inflated" in capsys.readouterr().out
    assert study(where) == 0
    content = json.loads((tmp_path / "out" / "motion.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["video", "frames", "dense", "inflated"]
    for run in (*content["runs"], *content["registered"]):
        assert run["parameters"] == run["formula_parameters"]
        assert run["flops"] == pytest.approx(run["formula_flops"], rel=1e-12)
    video, frames = content["runs"][:2]
    assert frames["training_flops"] < video["training_flops"]
    assert [row["capacity_factor"] for row in video["capacities"][::2]] == list(measure.CAPACITY_FACTORS)
    text = (tmp_path / "out" / "motion.md").read_text()
    for part in ("frame-by-frame V-MoE |", "| anticlockwise |", "At half the capacity BPR", "| `vmoe_video_l16` |"):
        assert part in text
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"motion_{name}" for name in ("accuracy.png", "capacity.png", "kept.png", "kept.gif")}
    with Image.open(tmp_path / "figures" / "motion_kept.gif") as played:
        assert played.n_frames == runs.FRAMES
    # What is finished is read, not trained again.
    before = (tiny / "video" / "last.pt").stat().st_mtime_ns
    assert study(where) == 0
    assert (tiny / "video" / "last.pt").stat().st_mtime_ns == before


def test_formula_counts_slots_by_the_definition():
    shape = formula.Shape(width=8, depth=2, hidden=16, patches=10, values=12, classes=3, sparse=1, experts=4, group=3)
    wide = replace(shape, multiple=4)
    # 30 tokens, 7.875 of them for each expert: 8 slots, which 4 divides; at C = 1.2 there are 9, or 12.
    assert shape.flops == wide.flops
    more = replace(wide, capacity=1.2).flops - replace(shape, capacity=1.2).flops
    assert more == 4 * 4 * 3 * 8 * 16 / 3
    blocks = 2 * (8 * 10 * 64 + 4 * 100 * 8 + 4 * 10 * 128)
    assert replace(shape, sparse=0).flops == 2 * 10 * 12 * 8 + 2 * 8 * 3 + blocks


def test_docs_have_the_tables_of_the_results():
    page, results = ROOT / "docs" / "video.md", RESULTS / "motion" / "motion.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(lines) > 10
    assert set(lines) <= set(results.read_text(encoding="utf-8").splitlines())
