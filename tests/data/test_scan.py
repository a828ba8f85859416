"""What counts in folders of images: classes, splits, endings, hidden files and links."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vmoe_torch.data import ImageFolder, LabelledImages, NamedDataset, described
from vmoe_torch.data import scanning as scan_module
from vmoe_torch.data.folder import class_folders, find_split


def put(path, value=0):
    """An image at a path, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


def found(folder, **options):
    """{class: paths below it} of an ImageFolder."""
    data = ImageFolder(folder, **options)
    names = {name: [] for name in data.class_names}
    for path, label in data.samples:
        names[data.class_names[label]].append(os.path.relpath(path, folder))
    return names


@pytest.mark.parametrize("kind", ["folder", "torch/image_folder"])
def test_the_first_level_is_the_class(tmp_path, kind):
    for name in ("train/cat/batch1/a.jpg", "train/dog/batch1/b.jpg", "train/dog/batch2/deep/c.jpg", "train/dog/d.jpg"):
        put(tmp_path / name)
    data = ImageFolder(tmp_path / "train") if kind == "folder" else NamedDataset(kind, tmp_path, "train")
    assert data.class_names == ("cat", "dog")
    assert [label for _, label in data] == [0, 1, 1, 1]
    assert described(data) == "4 images in 2 classes"


def test_order_of_classes_does_not_depend_on_the_hash_seed(tmp_path):
    alike = ("A", "a"), ("1", "01", "001"), ("x1", "X01", "x01")
    for number, names in enumerate(alike):
        for name in names:
            put(tmp_path / str(number) / name / "0.png")
    folders = [str(tmp_path / str(number)) for number in range(len(alike))]
    code = f"from vmoe_torch.data import ImageFolder\nfor f in {folders}: print(ImageFolder(f).class_names)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": s},
        ).stdout
        for s in ("1", "2", "3")
    }
    assert len(outputs) == 1
    for folder, names in zip(folders, alike):
        assert sorted(ImageFolder(folder).class_names) == sorted(names)


def test_order_of_classes_is_natural_and_total(tmp_path):
    for name in ("dog10", "dog2", "Dog2", "b", "A", "a", "²", "01", "1"):
        put(tmp_path / name / "0.png")
    assert ImageFolder(tmp_path).class_names == ("01", "1", "A", "a", "b", "Dog2", "dog2", "dog10", "²")


def test_all_that_pillow_reads_counts(tmp_path):
    put(tmp_path / "a" / "0.jpg")
    for number, ending in enumerate(("webp", "bmp", "tif", "TIFF", "gif", "jp2", "ppm", "jfif", "PNG", "tga", "avif")):
        put(tmp_path / f"b{number}" / f"0.{ending}")
    data = ImageFolder(tmp_path)
    assert len(data) == len(data.class_names) == 12
    assert [label for _, label in data] == list(range(12))
    assert data.notices == []


def test_what_is_passed_over_is_counted(tmp_path):
    put(tmp_path / "a" / "0.png")
    for name in ("a/notes.txt", "a/1.heic", "a/2.HEIC", "a/none", "labels.csv"):
        (tmp_path / name).touch()
    data = ImageFolder(tmp_path)
    assert len(data) == 1
    (notice,) = data.notices
    assert "passed over 5 files" in notice
    for part in (".heic 2", ".txt 1", ".csv 1", "no ending 1"):
        assert part in notice
    assert notice in described(data)


def test_hidden_and_system_files_are_passed_over(tmp_path):
    put(tmp_path / "a" / "0.png")
    for name in (
        ".ipynb_checkpoints/0.png",
        "@eaDir/0.png",
        "__MACOSX/a/0.png",
        "lost+found/0.png",
        "$RECYCLE.BIN/0.png",
        "a/@eaDir/0.png",
        "a/.ipynb_checkpoints/0.png",
        "a/._0.png",
        "a/.hidden.jpg",
        "._a.png",
    ):
        put(tmp_path / name)
    for name in ("a/Thumbs.db", "a/.DS_Store", ".DS_Store", "desktop.ini"):
        (tmp_path / name).touch()
    assert found(tmp_path) == {"a": ["a/0.png"]}
    assert ImageFolder(tmp_path).notices == []
    assert class_folders(tmp_path) == []


def test_every_folder_is_read_once(tmp_path):
    for name in ("b/0.png", "b/deep/1.png", "c/2.png"):
        put(tmp_path / "train" / name)
    put(tmp_path / "val" / "b" / "3.png")
    put(tmp_path / "elsewhere" / "4.png")
    for link, target in (
        ("train/train", "."),
        ("train/a", "b"),
        ("train/b/deep/up", ".."),
        ("train/c/root", "../.."),
        ("train/d", "../elsewhere"),
        ("train/c/more", "../../elsewhere"),
        ("train/self", "self"),
    ):
        (tmp_path / link).symlink_to(target)
    # A link takes no folder's place, and of two links to one the first counts.
    assert found(tmp_path / "train") == {"b": ["b/0.png", "b/deep/1.png"], "c": ["c/2.png", "c/more/4.png"]}
    assert "passed over 5 links to folders read already" in ImageFolder(tmp_path / "train").notices[-1]


def test_links_to_files_count_and_lead_nowhere_as_broken_images(tmp_path):
    put(tmp_path / "pool" / "0.png")
    (tmp_path / "x" / "a").mkdir(parents=True)
    (tmp_path / "x" / "a" / "0.png").symlink_to(tmp_path / "pool" / "0.png")
    (tmp_path / "x" / "a" / "1.png").symlink_to(tmp_path / "pool" / "none.png")
    data = ImageFolder(tmp_path / "x")
    assert (len(data), data[0][1]) == (2, 0)
    with pytest.raises(ValueError, match=r"image .*1\.png does not exist"):
        data[1]


def test_a_class_folder_without_an_image_is_a_class_and_named(tmp_path):
    put(tmp_path / "a" / "0.png")
    put(tmp_path / "c" / "0.png")
    (tmp_path / "b" / "deeper").mkdir(parents=True)
    data = ImageFolder(tmp_path)
    assert data.class_names == ("a", "b", "c")
    assert [label for _, label in data] == [0, 2]
    assert data.notices == ["no image in 1 of 3 class folders: b"]
    # Where the classes are known, an empty folder of another name does not matter.
    assert len(ImageFolder(tmp_path, class_names=("a", "c"))) == 2


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a" / "0.png")
    put(tmp_path / "b" / "0.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"folder .*/b cannot be read: Permission denied"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("split", ["val", "valid", "validation", "test", "Valid", "VAL"])
def test_splits_are_known_by_name(tmp_path, split):
    put(tmp_path / "train" / "a" / "0.png")
    put(tmp_path / split / "a" / "0.png")
    assert class_folders(tmp_path) == [split]
    if split.lower() != "test":
        assert find_split(tmp_path, "val") == find_split(tmp_path, "validation") == split
    assert find_split(tmp_path, "training") == "train"
    assert find_split(tmp_path, "dev") is None


def test_a_split_that_is_not_there_is_never_the_whole_folder(tmp_path):
    put(tmp_path / "train" / "a" / "0.png")
    put(tmp_path / "holdout" / "a" / "0.png")
    with pytest.raises(ValueError, match=r"in a folder val, valid, validation, test in .*; it holds holdout, train"):
        class_folders(tmp_path)
    with pytest.raises(ValueError, match=r"split must be a folder in .*, got 'dev'; it holds holdout, train"):
        class_folders(tmp_path, "dev")
    assert class_folders(tmp_path, "holdout") == ["holdout"]
    assert class_folders(tmp_path, ".") == ["holdout", "train"]
    with pytest.raises(ValueError, match=r"split must be a folder in .*, got 'test'"):
        NamedDataset("torch/image_folder", tmp_path, "test")


def test_class_folders_may_be_called_as_splits(tmp_path):
    for name in ("bus", "train", "test"):
        put(tmp_path / name / "0.png")
    assert class_folders(tmp_path) == []
    assert list(found(tmp_path)) == ["bus", "test", "train"]


def test_all_splits_together_share_classes(tmp_path):
    for name in ("train/a/0.png", "train/b/1.png", "val/b/2.png", "val/c/3.png"):
        put(tmp_path / name)
    data = ImageFolder(tmp_path, parts=class_folders(tmp_path, "."))
    assert data.class_names == ("a", "b", "c")
    assert [label for _, label in data] == [0, 1, 1, 2]


def test_digest_tells_lists_of_images_apart(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        put(tmp_path / "x" / name)
    first = ImageFolder(tmp_path / "x").digest()
    (tmp_path / "x").rename(tmp_path / "moved")
    assert ImageFolder(tmp_path / "moved").digest() == first
    (tmp_path / "moved" / "a" / "1.png").rename(tmp_path / "moved" / "a" / "2.png")
    renamed = ImageFolder(tmp_path / "moved").digest()
    (tmp_path / "moved" / "a" / "2.png").rename(tmp_path / "moved" / "b" / "2.png")
    assert len({first, renamed, ImageFolder(tmp_path / "moved").digest()}) == 3


class Names(tuple):
    """Names of classes that are looked for one after the other by nobody."""

    def index(self, *arguments):
        pytest.fail("a search through all classes for each of them takes quadratic time")

    def __contains__(self, name):
        pytest.fail("a search through all classes for each of them takes quadratic time")


def test_classes_are_not_searched_for_one_by_one(tmp_path):
    for name in ("a", "b", "c"):
        put(tmp_path / name / "0.png")
    data = ImageFolder(tmp_path, class_names=Names("cba"))
    assert [label for _, label in data.samples] == [2, 1, 0]
    images = LabelledImages(data, "images", "RGB")
    images.follow(Names("bacd"))
    assert images.labels().tolist() == [1, 0, 2]


def test_long_scans_show_progress(tmp_path, monkeypatch, capsys):
    put(tmp_path / "a" / "0.png")
    made = []

    class Bar(scan_module.tqdm):
        def __init__(self, **options):
            made.append(options)
            super().__init__(**{**options, "delay": 0})

    monkeypatch.setattr(scan_module, "tqdm", Bar)
    ImageFolder(tmp_path)
    assert "reading folders" in capsys.readouterr().err
    assert made[0]["delay"] > 0


def test_names_that_are_no_text_are_shown_escaped(tmp_path):
    folder = os.fsencode(tmp_path) + b"/c\nd"
    os.mkdir(folder)
    with open(folder + b"/b\xe9.jpg", "wb") as file:
        file.write(b"no image")
    data = ImageFolder(tmp_path)
    assert len(data.digest()) == 64
    with pytest.raises(ValueError, match=r"image .*/c\\nd/b\\xe9\.jpg cannot be read: .*") as caught:
        data[0]
    str(caught.value).encode()
    assert "\n" not in str(caught.value)
