"""The images of a run: said, the same when it goes on, the same for every process, and turned as the run says."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe_torch.train import build_data, load_model, train
from vmoe_torch.train.build import check_alike
from vmoe_torch.train.record.table import read_table


@pytest.fixture
def root(tmp_path):
    """24 training and 8 validation images in two classes, one of them with deeper folders."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 4)):
        for name in ("a", "b/deep"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 256, (28, 28), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def config(tiny, root):
    """Three updates an epoch, two epochs."""
    return tiny.override("data.name=folder", f"data.root={root}", "data.batch_size=8")


def test_a_run_says_which_images_it_has(config, root, capfd):
    (root / "train" / "a" / "notes.txt").touch()
    train(config.override("run.max_updates=1", "run.summary=true"))
    shown = capfd.readouterr().err
    assert f"train, {root}/train: 24 images in 2 classes; passed over 1 files" in shown
    assert f"val, {root}/valid: 8 images in 2 classes\n" in shown
    (alarm,) = read_table(Path(config.run.output) / "alarms.csv")
    assert alarm["kind"] == "data"
    assert ".txt 1" in alarm["message"]
    environment = json.loads((Path(config.run.output) / "environment.json").read_text())
    assert environment["data"][1].endswith("8 images in 2 classes")


def test_splits_that_mean_the_same_are_found(config, root):
    assert len(build_data(config.data).val) == 8
    (root / "valid").rename(root / "Validation")
    assert len(build_data(config.data).val) == 8
    (root / "Validation").rename(root / "holdout")
    with pytest.raises(ValueError, match=r"image folder .*images/val does not exist; .* holds holdout, train"):
        build_data(config.data)


def test_empty_class_folders_are_refused_in_training_and_named_in_validation(config, root):
    (root / "valid" / "c").mkdir()
    assert build_data(config.data).notices() == ["val: no image in 1 of 3 class folders: c"]
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "0.heic").touch()
    with pytest.raises(ValueError, match=r"class folders in .*train must hold an image each, got .*heic 1.*: c"):
        build_data(config.data)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("change", ["remove", "add", "rename", "relabel"])
def test_a_run_goes_on_with_the_same_images_only(config, root, split, change):
    train(config.override("run.max_updates=2"))
    path = root / split / "a" / "1.png"
    if change == "remove":
        path.unlink()
    elif change == "add":
        (path.parent / "99.png").write_bytes(path.read_bytes())
    elif change == "rename":
        path.rename(path.parent / "98.png")
    else:
        path.rename(root / split / "b" / "1.png")
    name = {"train": "train", "valid": "val"}[split]
    with pytest.raises(
        ValueError, match=rf"images of data\.{name}_split must be those of the run to resume, \d+, got \d+"
    ):
        train(config, resume=True)


def test_a_run_goes_on_where_its_images_have_moved(config, root, tmp_path):
    train(config.override("run.max_updates=2"))
    root.rename(tmp_path / "moved")
    # Not of the run: neither a list of images nor a label.
    (tmp_path / "moved" / "train" / ".cache").mkdir()
    assert train(config.override(f"data.root={tmp_path}/moved"), resume=True).finished


def test_checkpoints_of_earlier_versions_go_on(config):
    train(config.override("run.max_updates=2"))
    (path,) = (Path(config.run.output) / "checkpoints").glob("update_*")
    saved = torch.load(path / "state.pt", weights_only=True)
    del saved["state"]["data"], saved["state"]["config"]["data"]["exif"]
    torch.save(saved, path / "state.pt")
    files = json.loads((path / "complete.json").read_text())
    files["state.pt"] = [(path / "state.pt").stat().st_size, zlib.crc32((path / "state.pt").read_bytes())]
    (path / "complete.json").write_text(json.dumps(files))
    assert train(config, resume=True).finished


def test_processes_must_see_the_same_images(config, root):
    facts = build_data(config.data).facts()
    check_alike([facts, facts])
    (root / "train" / "a").rename(root / "train" / "A")
    (root / "valid" / "a").rename(root / "valid" / "A")
    other = build_data(config.data).facts()
    with pytest.raises(
        ValueError, match=r"data\.train_split must be the same for every process, got 24 .* in process 0, 24"
    ):
        check_alike([facts, other])


def test_images_are_turned_as_the_run_says(config, root):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (30, 20)).save(root / "train" / "a" / "0.png", exif=exif)
    assert build_data(config.data).train[0][0].size == (30, 20)
    assert build_data(config.override("data.exif=true").data).train[0][0].size == (20, 30)


def test_names_that_are_no_text_do_not_end_a_run(config, root):
    """Of a class, and of a broken image."""
    for split in ("train", "valid"):
        (root / split / "a").rename(root / split / "a\udce9\n$x$")
    (root / "train" / "b" / "b\udce9.jpg").write_bytes(b"no image")
    changes = ("data.max_broken=1", "run.max_updates=3", "run.summary=true", "run.log_every=1")
    assert train(config.override(*changes)).history
    (alarm,) = read_table(Path(config.run.output) / "alarms.csv")
    assert r"b\xe9.jpg cannot be read" in alarm["message"]
    assert r"b\xe9.jpg" in (Path(config.run.output) / "summary.html").read_text(encoding="utf-8")
    assert load_model(config.run.output)[2][0] == "a\udce9\n$x$"


def test_one_pass_of_a_validation_names_all_broken_images(config, root):
    for number in (0, 1, 3):
        (root / "valid" / "a" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data\.max_broken must be .*, 3: image .*0\.png .*1\.png .*3\.png"):
        train(config.override("schedule.epochs=1", "data.max_broken=1"))
