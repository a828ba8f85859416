"""WebDataset's shards: splits, labels, order, and errors that name the shard and the sample."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vmoe_torch.data import BrokenImageError, TarShards
from vmoe_torch.data.shards import find_shards
from vmoe_torch.train import Config, build_data


def write_shard(path, samples):
    """A shard of (key, grey value or bytes of the image, bytes of the label or None)."""
    with tarfile.open(path, "w") as tar:
        for key, image, label in samples:
            if not isinstance(image, bytes):
                file = io.BytesIO()
                Image.fromarray(np.full((4, 5, 3), image, np.uint8)).save(file, "png")
                image = file.getvalue()
            for kind, data in (("png", image), ("json", b"{}"), ("cls", label)):
                if data is not None:
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    """Five images of three classes for training in two shards, two of two classes for validation in one."""
    for name, samples in (
        ("pets-train-0000", [("a.b/0", 0, b"0"), ("a/1", 10, b"2\n")]),
        ("pets-train-0001", [("b/0", 20, b"1"), ("b/1", 30, b"0"), ("b" * 120, 40, b"1")]),
        ("pets-val-0000", [("c/0", 50, b"1"), ("c/1", 60, b"0")]),
    ):
        write_shard(tmp_path / f"{name}.tar", samples)
    return tmp_path


def test_images_and_labels_at_any_place(root):
    data = TarShards(root, "train", mode="L")
    assert data.labels.tolist() == [0, 2, 1, 0, 1]
    assert data.class_names == ("0", "1", "2")
    for index in (3, 0, 4, 1, 2):
        image, label = data[index]
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (5, 4), 10 * index)
        assert label == data.labels[index]


def test_classes_have_names_where_a_file_gives_them(root):
    (root / "classnames.txt").write_text("cat\ndog\nfox\nowl\n")
    assert TarShards(root, "train").class_names == ("cat", "dog", "fox", "owl")


@pytest.mark.parametrize(
    ("split", "count"),
    [("train", 2), ("val", 1), ("pets", 3), ("pets-train-{0000..0001}.tar", 2), ("pets-val-0000.tar", 1), ("few", 1)],
)
def test_splits(root, split, count):
    (root / "_info.json").write_text(json.dumps({"splits": {"few": {"filenames": ["pets-train-0001.tar"]}}}))
    assert len(find_shards(root, split)) == count


def test_split_may_be_a_folder(root):
    (root / "test").mkdir()
    (root / "pets-val-0000.tar").rename(root / "test" / "0.tar")
    assert TarShards(root, "test").labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", r"split must name shards \(\.tar\) in .*, got 'dev'"),
        ("pets-train-{0000..0002}.tar", r"shard .*pets-train-0002\.tar does not exist"),
    ],
)
def test_missing_shards_are_named(root, split, message):
    with pytest.raises(ValueError, match=message):
        TarShards(root, split)
    with pytest.raises(ValueError, match=r"folder of shards .*nowhere does not exist"):
        TarShards(root / "nowhere", "train")


@pytest.mark.parametrize("keep", [0, 100, 700, 3000])
def test_cut_off_or_compressed_shard_is_named(root, keep):
    path = root / "pets-train-0001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"pets-train-0001\.tar must be a whole tar file without compression"):
        TarShards(root, "train")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"must be a whole tar file without compression"):
        TarShards(root, "train")


@pytest.mark.parametrize(("label", "got"), [(None, "none"), (b"cat", "b'cat'"), (b"", "b''")])
def test_sample_without_a_label_is_named(root, label, got):
    write_shard(root / "pets-train-0001.tar", [("b/0", 20, b"1"), ("b/1", 30, label)])
    with pytest.raises(ValueError, match=rf"sample b/1 in .*0001\.tar must have a number in its \.cls file, got {got}"):
        TarShards(root, "train")


def test_sample_without_an_image_is_named(root):
    write_shard(root / "pets-train-0001.tar", [("b/0", 20, b"1"), ("b/1.front", 30, b"1")])
    with pytest.raises(ValueError, match=r"sample b/1 in .*0001\.tar must have an image \(jpg, .*\), got none"):
        TarShards(root, "train")


def test_label_without_a_class_is_named(root):
    with pytest.raises(ValueError, match=r"label of a/1\.png in .*0000\.tar must be in 0\.\.1, got 2"):
        TarShards(root, "train", class_names=("cat", "dog"))


def test_shards_without_images_are_refused(root):
    with tarfile.open(root / "pets-train-0000.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"shards must hold images \(jpg, jpeg, png, webp\), got none in .*0000\.tar"):
        TarShards(root, "pets-train-0000.tar")


def test_broken_image_is_named(root):
    write_shard(root / "pets-train-0000.tar", [("a/0", b"no image", b"0"), ("a/1", 10, b"2")])
    data = TarShards(root, "train")
    assert data[1][1] == 2
    with pytest.raises(BrokenImageError, match=r"image a/0\.png in .*pets-train-0000\.tar cannot be read"):
        data[0]


def test_build_data_takes_shards(root):
    config = Config().override("data.name=wds/", f"data.root={root}")
    config.check()
    data = build_data(config.data)
    assert (len(data.train), len(data.val)) == (5, 2)
    assert data.class_names == data.val.class_names == ("0", "1", "2")
