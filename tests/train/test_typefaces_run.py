"""A run on typefaces: built from its configuration, distorted in training alone, and resumed to equal bits."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from vmoe_torch.train import build_data, build_model, build_transforms, train

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def on_typefaces(tiny, tmp_path, monkeypatch):
    """Five updates of 16 images an epoch, on 40 letters of two fonts; validated on a third."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, names in (("train", ("DejaVuSans", "cmr10")), ("val", ("DejaVuSerif",))):
        (tmp_path / "fonts" / split).mkdir(parents=True)
        for name in names:
            shutil.copy(SHIPPED / f"{name}.ttf", tmp_path / "fonts" / split)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmn"
    (tmp_path / "fonts" / "characters.txt").write_text(letters)
    return tiny.override(
        "data.name=typefaces",
        f"data.root={tmp_path / 'fonts'}",
        "data.kwargs.side=32",
        "data.mixup=0",
    )


def test_typefaces_run_is_distorted_in_training_only(on_typefaces):
    data = build_data(on_typefaces.data, "L")
    assert len(data.class_names) == 40
    assert data.train[0][0].size == (32, 32)
    training, evaluation = build_transforms(on_typefaces.data, build_model(on_typefaces.model, 40))
    image = data.val[0][0]
    assert training(image).shape == evaluation(image).shape == (1, 28, 28)
    assert torch.equal(evaluation(image), evaluation(image))
    assert not torch.equal(training(image), training(image))
    plain, _ = build_transforms(on_typefaces.override("data.augment=false").data, build_model(on_typefaces.model, 40))
    assert torch.equal(plain(image), plain(image))
    still, _ = build_transforms(on_typefaces.override("data.distort=0").data, build_model(on_typefaces.model, 40))
    assert torch.equal(still(image), still(image))


def test_typefaces_run_resumes_to_equal_bits(on_typefaces, tmp_path):
    whole = train(on_typefaces)
    assert whole.updates == 10
    stopped = on_typefaces.override(f"run.output={tmp_path / 'stopped'}", "data.workers=1")
    train(stopped.override("run.max_updates=3"))
    again = train(stopped, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert np.array_equal(tensor.numpy(), again.model.state_dict()[name].numpy()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.kwargs.side=3", r"data\.kwargs\.side must be at least 8, got 3"),
        ("data.kwargs.side=32.5", r"data\.kwargs\.side must be int, got 32\.5"),
        ("data.kwargs.side=large", r"data\.kwargs\.side must be int, got 'large'"),
        ("data.kwargs.sides=32", r"data\.kwargs\.sides is an unexpected .*; did you mean side\?"),
        ("data.kwargs.characters=ABA", r"data\.kwargs\.characters must be named once each, got 'A' twice"),
        ("data.kwargs.characters=123", r"data\.kwargs\.characters must be .*str.*, got 123"),
        ("data.kwargs.characters=[1]", r"data\.kwargs\.characters must be single characters .*, got 1"),
        ("data.kwargs.characters=A日本", "characters must each be in a font of .*train, got 日, 本 that no face has"),
        ("data.root=null", r"data\.root must name the folder of fonts"),
        ("data.train_split=none", "folder of fonts .*none does not exist"),
    ],
)
def test_typefaces_run_refuses(on_typefaces, change, message):
    with pytest.raises(ValueError, match=message):
        train(on_typefaces.override(change))


def test_keys_of_a_typefaces_run_that_change_nothing_are_refused(on_typefaces):
    for change in ("data.hflip=0", "data.scale=0.5,1", "data.exif=true", "data.max_broken=1", "data.color_jitter=1"):
        key = change.partition("=")[0]
        with pytest.raises(ValueError, match=f"^{key} must be .*, its default, with data.name=typefaces, which "):
            on_typefaces.override(change).check()
    # Left without effect by another data set, not asked for there.
    assert on_typefaces.override("data.name=folder").data.kwargs == {}
    with pytest.raises(ValueError, match=r"^data\.kwargs must be \{\}, its default, with data.name=folder, got .*64"):
        on_typefaces.override("data.name=folder", "data.kwargs.side=64").check()


def test_characters_of_a_typefaces_run_may_be_in_its_configuration(on_typefaces):
    data = build_data(on_typefaces.override("data.kwargs.characters=aZ").data, "L")
    assert data.class_names == ("a", "Z")
    assert len(data.train) == 4
    assert data.train[0][0].size == (32, 32)


def test_typefaces_in_colour_are_distorted_in_grey(on_typefaces):
    config = on_typefaces.override("model.kwargs.in_chans=3", "data.mean=0.5", "data.std=0.5")
    training, _ = build_transforms(config.data, build_model(config.model, 40))
    image = training(build_data(config.data, "RGB").train[0][0])
    assert image.shape == (3, 28, 28)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_typefaces_run_says_what_it_has(on_typefaces, tmp_path, capfd):
    fonts = tmp_path / "fonts"
    (fonts / "val").rename(fonts / "valid")
    shutil.copy(SHIPPED / "DejaVuSans.ttf", fonts / "train" / "same.ttf")
    train(on_typefaces.override("run.max_updates=1"))
    shown = capfd.readouterr().err
    assert (
        f"train, {fonts}/train: 80 images in 40 classes; passed over 1 faces that draw all as an earlier one" in shown
    )
    assert f"val, {fonts}/valid: 40 images in 40 classes\n" in shown


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", ["remove", "add", "replace"])
def test_typefaces_run_goes_on_with_the_same_fonts_only(on_typefaces, tmp_path, split, change):
    train(on_typefaces.override("run.max_updates=2"))
    folder = tmp_path / "fonts" / split
    if change != "add":
        next(folder.iterdir()).unlink()
    # Still a font, and as many images where it replaces one.
    if change != "remove" or split == "val":
        shutil.copy(SHIPPED / "DejaVuSerif-Italic.ttf", folder / "another.ttf")
    with pytest.raises(ValueError, match=rf"images of data\.{split}_split must be those of the run to resume"):
        train(on_typefaces, resume=True)


def test_typefaces_run_goes_on_where_its_fonts_have_moved(on_typefaces, tmp_path):
    train(on_typefaces.override("run.max_updates=2"))
    (tmp_path / "fonts").rename(tmp_path / "moved")
    moved = on_typefaces.override(f"data.root={tmp_path / 'moved'}")
    # White space means nothing, the order is that of the labels.
    characters = tmp_path / "moved" / "characters.txt"
    letters = characters.read_text()
    characters.write_text(letters[::-1])
    with pytest.raises(ValueError, match=r"data must have the classes of the run to resume, 40 \(A, B, C, \.\.\.\)"):
        train(moved, resume=True)
    characters.write_text("\n".join(letters))
    assert train(moved, resume=True).finished
