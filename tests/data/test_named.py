"""Data sets of timm's by name: labels, modes, broken images and streams."""

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset

from vmoe_torch.data import BrokenImageError, NamedDataset, named
from vmoe_torch.train import Config, build_data


@pytest.fixture
def root(tmp_path):
    """Two classes of two images in each split; the second cat of "train" is cut off."""
    for number, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")):
        for split in ("train", "val"):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 5, 3), 40 * number, np.uint8)).save(path)
    path = tmp_path / "train" / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:40])
    return tmp_path


def test_torchvision_data_set_by_name(root):
    data = NamedDataset("torch/image_folder", root, "val", mode="L")
    assert data.class_names == ("cat", "dog")
    assert data.labels == [label for _, label in data] == [0, 0, 1, 1]
    image, label = data[3]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("L", (5, 4), 120, 1)


def test_build_data_takes_names_of_timm(root):
    config = Config().override("data.name=torch/image_folder", f"data.root={root}")
    config.check()
    data = build_data(config.data)
    assert (len(data.train), len(data.val), data.class_names) == (4, 4, ("cat", "dog"))


def test_build_data_refuses_splits_with_other_classes(root):
    (root / "val" / "dog").rename(root / "val" / "fox")
    config = Config().override("data.name=torch/image_folder", f"data.root={root}")
    with pytest.raises(ValueError, match="both splits of torch/image_folder must name the same classes"):
        build_data(config.data)


def test_broken_image_is_named(root):
    data = NamedDataset("torch/image_folder", root, "train")
    with pytest.raises(BrokenImageError, match=r"image .*train/cat/2\.png cannot be read"):
        data[1]


def test_broken_image_is_not_replaced_in_silence(root, monkeypatch):
    monkeypatch.setattr(named, "create_dataset", lambda name, root, **kwargs: ImageDataset(f"{root}/train"))
    data = NamedDataset("hfds/pets", root, "train")
    assert data.class_names == ("cat", "dog")
    assert [data[index][1] for index in (0, 2, 3)] == [0, 1, 1]
    with pytest.raises(BrokenImageError, match=r"image cat/2\.png cannot be read"):
        data[1]


def test_data_set_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data set torch/cifar10 in .* cannot be opened: Dataset not found"):
        NamedDataset("torch/cifar10", tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "split", "want"),
    [
        ("torch/cifar10", "Train", "train"),
        ("torch/cifar10", "Validation", "validation"),
        ("torch/inaturalist", "2021_Valid", "2021_Valid"),
        ("hfds/pets", "Train", "Train"),
    ],
)
def test_splits_of_torchvision_are_known_whatever_the_case(monkeypatch, name, split, want):
    """timm would take its test images for "Train"."""
    opened = []
    monkeypatch.setattr(named, "create_dataset", lambda name, split, **kwargs: opened.append(split) or [])
    NamedDataset(name, None, split)
    assert opened == [want]


@pytest.mark.parametrize("name", ["torch/image_folder", "hfds/pets"])
def test_images_have_the_mode_that_is_asked_for(root, monkeypatch, name):
    if name.startswith("hfds"):
        monkeypatch.setattr(named, "create_dataset", lambda name, root, **kwargs: ImageDataset(f"{root}/val"))
    assert [NamedDataset(name, root, "val", mode)[0][0].mode for mode in ("RGB", "L")] == ["RGB", "L"]


@pytest.mark.parametrize("name", ["tfds/mnist", "hfids/food101"])
def test_streams_are_refused(tmp_path, name):
    config = Config().override(f"data.name={name}", f"data.root={tmp_path}")
    config.check()
    with pytest.raises(ValueError, match=f"whose images have numbers, torch/NAME or hfds/NAME, got {name}"):
        build_data(config.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.name=cifar10",
            r"data\.name must be one of folder, video, .*, wds/, torch/NAME, hfds/NAME, got 'cifar10'",
        ),
        ("data.name=wds/", r"data\.root must name the folder of .* for data\.name=wds/, got none"),
        ("data.name=torch/cifar10", r"data\.root must name the folder of .* for data\.name=torch/cifar10, got none"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Config().override(change).check()
