"""Image folders: labels by folder, and errors that name the file or the folder."""

import numpy as np
import pytest
from PIL import Image

from vmoe_torch.data import ImageFolder, read_image


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images each."""
    for number, name in enumerate(("cat/1.png", "cat/2.jpg", "dog10/a.png", "dog10/b.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 5, 3), 40 * number, np.uint8)).save(path)
    return tmp_path


def test_folder_labels_by_class(folder):
    data = ImageFolder(folder)
    assert data.class_names == ("cat", "dog10")
    assert [label for _, label in data] == [0, 0, 1, 1]
    image, _ = data[3]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 4), (120, 120, 120))
    assert ImageFolder(folder, mode="L")[3][0].mode == "L"


def test_folder_takes_the_labels_of_another_split(folder):
    data = ImageFolder(folder, class_names=("bird", "dog10", "cat"))
    assert [label for _, label in data] == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="must be among the training classes, got dog10 too"):
        ImageFolder(folder, class_names=("cat", "bird"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_broken_image_is_named(folder, content):
    path = folder / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:40] if content is None else content)
    data = ImageFolder(folder)
    with pytest.raises(ValueError, match=r"image .*cat/1\.png cannot be read"):
        data[0]


def test_missing_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"image .*none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path)


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"image folder .* must hold one folder of images per class, got no image"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match=r"image folder .*none does not exist"):
        ImageFolder(tmp_path / "none")


def test_loose_image_is_named(folder):
    (folder / "cat" / "1.png").rename(folder / "loose.png")
    with pytest.raises(ValueError, match=r"must lie in one folder per class, got .*loose\.png"):
        ImageFolder(folder)
