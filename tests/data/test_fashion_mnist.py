"""The images that ship with the package, and the IDX format."""

import gzip

import numpy as np
import pytest

from vmoe_torch.data import FashionMnist, open_data
from vmoe_torch.data.fashion_mnist import IMAGES_PER_CLASS, MEAN, SHIPPED, STD, write_subset
from vmoe_torch.data.idx import read_idx, write_idx


@pytest.mark.parametrize("split", ["train", "test"])
def test_shipped_images_are_balanced_and_in_mixed_order(split):
    data = FashionMnist(split)
    assert data.images.shape == (10 * IMAGES_PER_CLASS[split], 28, 28)
    assert np.bincount(data.labels).tolist() == [IMAGES_PER_CLASS[split]] * 10
    assert len(set(data.labels[:50])) == 10


def test_shipped_images_have_the_known_first_labels_and_moments():
    data = FashionMnist("train")
    assert data.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert data.class_names[9] == "ankle boot"
    assert data.images.mean() / 255 == pytest.approx(MEAN, abs=1e-3)
    assert data.images.std() / 255 == pytest.approx(STD, abs=1e-3)


def test_shipped_files_are_small_and_licensed():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 5_000_000
    assert "MIT License" in (SHIPPED / "LICENSE").read_text()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_item_is_a_picture_and_its_label(mode):
    data = FashionMnist("test", mode=mode)
    image, label = data[0]
    assert (image.mode, image.size, label) == (mode, (28, 28), 9)
    assert np.array_equal(np.asarray(image.convert("L")), data.images[0])


def test_subset_is_the_first_images_of_each_class(tmp_path):
    labels = np.random.default_rng(0).integers(0, 10, 12_000).astype(np.uint8)
    images = np.zeros((12_000, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(12_000) % 256, np.arange(12_000) // 256
    (tmp_path / "out").mkdir()
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    write_subset(tmp_path, tmp_path / "out")
    data = FashionMnist("test", tmp_path / "out")
    numbers = data.images[:, 0, 0] + 256 * data.images[:, 0, 1].astype(int)
    assert (np.diff(numbers) > 0).all()
    for label in range(10):
        assert numbers[data.labels == label].tolist() == np.flatnonzero(labels == label)[:200].tolist()


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 3, 5)])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_gives_back_what_was_written(tmp_path, shape, packed):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / "a.gz"
    write_idx(path, array)
    if not packed:
        (tmp_path / "a").write_bytes(gzip.decompress(path.read_bytes()))
        path = tmp_path / "a"
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an IDX file of unsigned bytes"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "must be an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03\x00", r"must hold 3 bytes of shape \(3,\), got 1"),
        (None, "cannot read"),
    ],
)
def test_idx_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_idx_names_a_truncated_gz(tmp_path):
    path = tmp_path / "a.gz"
    write_idx(path, np.arange(200, dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*a\.gz"):
        read_idx(path)


def test_write_idx_refuses_other_dtypes(tmp_path):
    with pytest.raises(ValueError, match="array must be uint8, got float64"):
        write_idx(tmp_path / "a.gz", np.zeros(3))


def test_open_data_knows_splits_whatever_the_case():
    for split, want in (("training", "train"), ("Train", "train"), ("Valid", "test"), ("TEST", "test"), (None, "test")):
        assert open_data("fashion_mnist", split=split).split == want
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\), got 'Dev'"):
        open_data("fashion_mnist", split="Dev")


def test_fashion_mnist_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(ValueError, match=r"split must be one of .* got 'val'"):
        FashionMnist("val")
    with pytest.raises(ValueError, match=r"must hold train-images-idx3-ubyte\.gz or"):
        FashionMnist("train", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((2, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="must agree, got shapes"):
        FashionMnist("train", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(2, 10, np.uint8))
    with pytest.raises(ValueError, match=r"labels in .* must be in 0\.\.9"):
        FashionMnist("train", tmp_path)
