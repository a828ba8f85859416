"""Commands on videos: eval with views, predict, and data that a model does not take."""

import json

import numpy as np
import pytest
import torch

from tests.test_cli import fails
from tests.tiny_video import NAME
from tests.videos import write_video
from vmoe_torch.cli import main
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import open_model
from vmoe_torch.evaluate import count_flops
from vmoe_torch.train import Config, train


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Splits with two classes of noise of 12 frames, wider than the model's."""
    folder, random = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in ("flip", "roll"):
            for number in range(count):
                noise = list(random.integers(0, 256, (12, 32, 80), np.uint8))
                write_video(folder / split / name / f"{number}.mkv", noise)
    return folder


@pytest.fixture(scope="module")
def video_run(videos, tmp_path_factory):
    """Folder of a run of one update."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = Config().override(
        f"model.name={NAME}",
        "model.kwargs.in_chans=1",
        "data.name=video",
        f"data.root={videos}",
        "data.batch_size=8",
        "data.crop_mode=center",
        "optim.lr=0.1",
        "schedule.epochs=1",
        f"run.output={folder}",
        "run.device=cpu",
        "run.progress=false",
        "run.tensorboard=false",
        "run.summary=false",
    )
    train(config)
    return folder


@torch.no_grad()
def by_hand(source, folder, views):
    """(N, classes) probabilities, view by view and video by video."""
    transform = source.transform.views(*views)
    found = []
    for video, _ in open_images(source, folder):
        clips = transform(video)
        clips = clips.unsqueeze(0) if views == (1, 1) else clips
        found.append(torch.stack([source.model(clip.unsqueeze(0))[0].softmax(0) for clip in clips]).mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("views", [(1, 1), (2, 3), (3, 1)])
def test_eval_averages_the_probabilities_of_the_views(video_run, videos, tmp_path, capsys, views):
    words = [] if views == (1, 1) else [f"--views={views[0]}x{views[1]}"]
    # Fewer views in a forward than a video has, and a batch that is not full.
    for size in ("4", "128"):
        arguments = [str(video_run), f"--data={videos}", f"--batch-size={size}", f"--out={tmp_path}/x.json", *words]
        assert main(["eval", *arguments]) == 0
        assert "6 videos in 2 classes" in capsys.readouterr().err
        (row,) = json.loads((tmp_path / "x.json").read_text())
        source = open_model(video_run)
        probabilities, labels = by_hand(source, videos, views), torch.tensor([0, 0, 0, 1, 1, 1])
        assert row["images"] == 6
        assert row["loss"] == pytest.approx(float(-probabilities[range(6), labels].log().mean()), rel=1e-5)
        assert row["top1"] == pytest.approx(float((probabilities.argmax(1) == labels).float().mean()))
        one = count_flops(source.model, torch.zeros(1, 1, 4, 32, 48)).total
        assert row["flops"] == pytest.approx(one * views[0] * views[1])


def test_eval_runs_a_grid_of_settings_with_views(video_run, videos, tmp_path):
    grid = ["--capacity=1,0.5", "--order=bpr", "--views=2x1", f"--out={tmp_path}/x.json"]
    assert main(["eval", str(video_run), f"--data=video={videos}", "--split=train", *grid]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["images"] for row in rows] == [8, 8]
    assert rows[0]["flops"] > rows[1]["flops"]


def test_predict_a_video(video_run, videos, capsys):
    paths = sorted(map(str, videos.glob("val/*/0.mkv")))
    source = open_model(video_run)
    for views, words in (((1, 1), []), ((2, 3), ["--views=2x3"])):
        want = by_hand(source, videos, views)[[0, 3]]
        assert main(["predict", str(video_run), *paths, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [lines[0], lines[3]] == paths
        for video, row in ((0, 1), (1, 4)):
            best = int(want[video].argmax())
            assert lines[row].split() == ["1", ("flip", "roll")[best], f"{float(want[video, best]):.1%}"]


def test_budget_and_fewshot_take_videos(video_run, videos, capsys):
    assert main(["fewshot", str(video_run), f"--data={videos}", "--shots=2"]) == 0
    assert main(["budget", str(video_run), f"--data={videos}", "--flops=0.9"]) == 0
    assert "8 videos in 2 classes" in capsys.readouterr().err


def test_broken_videos_are_named_and_left_out(video_run, videos, tmp_path, capsys):
    for name, content in (("flip/0.mkv", b"no video"), ("roll/1.mkv", b"")):
        write_video(tmp_path / name).write_bytes(content)
    write_video(tmp_path / "roll" / "2.mkv")
    assert main(["eval", str(video_run), f"--data={tmp_path}", "--max-broken=2", f"--out={tmp_path}/x.json"]) == 0
    assert "skipped, 2 of max_broken=2" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())[0]["images"] == 1
    fails(capsys, ["eval", video_run, "--data", tmp_path], "max_broken must be at least the number of broken images, 2")
    names = [tmp_path / "flip" / "0.mkv", tmp_path / "roll" / "1.mkv"]
    fails(capsys, ["predict", video_run, *names], *(f"video {name} cannot be read" for name in names))


def test_what_does_not_fit_is_refused(video_run, run_folder, videos, image_folder, capsys):
    fails(capsys, ["eval", video_run, "--data=fashion_mnist"], "data must be videos, as the model takes them, got fa")
    fails(capsys, ["eval", video_run, "--data", image_folder], "must hold one folder of videos per class, got no")
    fails(capsys, ["eval", run_folder, f"--data=video={videos}"], "data must be images, as the model takes them, got")
    fails(capsys, ["eval", run_folder, "--data", image_folder, "--views=2x1"], "--views needs a model of videos")
    for wrong in ("8", "0x1", "2x", "axb", "2x3x4"):
        with pytest.raises(SystemExit, match="2"):
            main(["eval", str(video_run), f"--data={videos}", f"--views={wrong}"])
        assert "must be CLIPSxCROPS, each at least 1, as 8x3" in capsys.readouterr().err
