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


@pytest.mark.parametrize("split", ["Train", "TRAINING", "training"])
def test_splits_are_known_whatever_the_case(root, split):
    want = find_shards(root, "train")
    assert find_shards(root, split) == want
    for path in want:
        path.rename(root / path.name.replace("train", "Train"))
    assert [path.name for path in find_shards(root, split)] == ["pets-Train-0000.tar", "pets-Train-0001.tar"]
    (root / "_info.json").write_text(json.dumps({"splits": {"Train": {"filenames": ["pets-Train-0001.tar"]}}}))
    assert len(find_shards(root, split)) == 1
    (root / "_info.json").unlink()
    (root / "Training").mkdir()
    (root / "pets-Train-0001.tar").rename(root / "Training" / "0.tar")
    (root / "pets-Train-0000.tar").unlink()
    assert find_shards(root, split) == [root / "Training" / "0.tar"]


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


def write_files(path, *files, form=tarfile.PAX_FORMAT):
    """A tar file of (name, content), (name, grey value of an image), or TarInfo without content."""
    with tarfile.open(path, "w", format=form) as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
                continue
            name, content = file
            if isinstance(content, int):
                data = io.BytesIO()
                Image.fromarray(np.full((4, 5, 3), content, np.uint8)).save(data, "png")
                content = data.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [("000.jpg", 0), ("000.png", 1), ("000.cls", b"0")],
            r"sample 000 in .*x-train\.tar must have one image, got 000\.jpg and 000\.png",
        ),
        ([("000.jpg", 0), ("000.jpg", 1), ("000.cls", b"0")], "must have one image, got 000.jpg and 000.jpg"),
        ([("000.jpg", 0), ("000.cls", b"0"), ("000.cls", b"1")], r"sample 000 in .* must have one \.cls file, got two"),
        (
            [("0.jpg", 0), ("0.cls", b"0"), ("1.jpg", 0), ("1.cls", b"0"), ("0.jpg", 0), ("0.cls", b"1")],
            r"sample 0 in .* must come once, with its files in a row, got it again",
        ),
        ([("0.jpg", 0), ("0.cls", b"1" * 20)], r"sample 0 in .* must have a number in its \.cls file, got b'1111"),
        (
            [("0.jpg", 0), ("0.cls", b"1" * 18)],
            r"label of 0\.jpg in .* must be in 0\.\.1048575, got 111111111111111111",
        ),
        ([("0.jpg", 0), ("0.cls", b"-1")], r"label of 0\.jpg in .* must be in 0\.\.1048575, got -1"),
        *(
            ([("0.jpg", 0), ("0.cls", label)], r"sample 0 in .* must have a number in its \.cls file, got b")
            for label in (
                b"1.0",
                b"1e0",
                b'{"label": 1}',
                b"1 2",
                b"1_0",
                b"+1",
                b"\xef\xbb\xbf1",
                b"0x1",
                b"\0",
                b" \n",
            )
        ),
    ],
)
def test_samples_that_are_not_one_image_and_one_label_are_named(tmp_path, files, message):
    write_files(tmp_path / "x-train.tar", *files)
    with pytest.raises(ValueError, match=message):
        TarShards(tmp_path, "train")


def test_links_and_sparse_files_are_named(tmp_path):
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = kind, "0.jpg"
        write_files(tmp_path / "x-train.tar", ("0.jpg", 0), ("0.cls", b"0"), link)
        with pytest.raises(ValueError, match=r"1\.jpg in .*x-train\.tar must be a plain file, got a link"):
            TarShards(tmp_path, "train")
    sparse = tarfile.TarInfo("1.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "1.jpg"}
    write_files(tmp_path / "x-train.tar", ("0.jpg", 0), ("0.cls", b"0"), sparse)
    with pytest.raises(ValueError, match=r"1\.jpg in .*x-train\.tar must be a plain file, got a sparse one"):
        TarShards(tmp_path, "train")


def test_what_belongs_to_no_sample_is_passed_over(tmp_path):
    write_files(
        tmp_path / "x-train.tar",
        ("README", b"text"),
        ("._0.jpg", b"resource"),
        ("__MACOSX/._0.jpg", b"resource"),
        ("__MACOSX/0.jpg", b"resource"),
        (".DS_Store", b""),
        ("./0.JPG", 50),
        ("./0.CLS", b"\n 1\r\n"),
        ("./0.json", b"{}"),
    )
    (tmp_path / "._x-train.tar").write_bytes(b"resource")
    data = TarShards(tmp_path, "train")
    assert (len(data), data.labels.tolist(), data[0][0].getpixel((0, 0))) == (1, [1], (50, 50, 50))


def test_all_that_pillow_reads_counts(tmp_path):
    write_files(tmp_path / "x-train.tar", ("0.bmp", 0), ("0.cls", b"0"), ("1.tiff", 0), ("1.cls", b"1"))
    assert TarShards(tmp_path, "train").labels.tolist() == [0, 1]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_no_text_are_shown_escaped(tmp_path, form):
    write_files(tmp_path / "x-train.tar", ("b\udce9.jpg", b"none"), ("b\udce9.cls", b"0"), form=form)
    data = TarShards(tmp_path, "train")
    with pytest.raises(BrokenImageError, match=r"image b.*xe9\.jpg in .* cannot be read") as caught:
        data[0]
    str(caught.value).encode()
    assert len(data.digest()) == 64


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_splits_are_known_by_name(tmp_path, name):
    write_shard(tmp_path / "x-train-0.tar", [("0", 0, b"0")])
    with pytest.raises(
        ValueError, match=r"split must name shards .* got one of val, valid, .*; it holds x-train-0\.tar"
    ):
        find_shards(tmp_path, None)
    write_shard(tmp_path / f"x-{name}-0.tar", [("0", 0, b"0")])
    assert find_shards(tmp_path, None) == [tmp_path / f"x-{name}-0.tar"]
    if name != "test":
        assert find_shards(tmp_path, "val") == find_shards(tmp_path, None)


@pytest.mark.parametrize("text", ["[]", "{", '{"splits": {"train": {}}}', '{"splits": 3}'])
def test_damaged_lists_of_splits_are_named(root, text):
    (root / "_info.json").write_text(text)
    with pytest.raises(ValueError, match=r"_info\.json must list the shards of each split, got"):
        TarShards(root, "train")


def test_names_of_classes_are_lines(root):
    (root / "classnames.txt").write_bytes("\ufeffcat\r\ndog\u2028s\r\n\r\nowl\r\n\r\n".encode())
    assert TarShards(root, "train").class_names == ("cat", "dog\u2028s", "", "owl")
    (root / "classnames.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"classnames\.txt must be text in UTF-8"):
        TarShards(root, "train")


def test_digest_tells_lists_of_images_apart(root):
    first = TarShards(root, "train").digest()
    assert TarShards(root, "train").digest() == first
    write_shard(root / "pets-train-0001.tar", [("b/0", 20, b"1")])
    assert TarShards(root, "train").digest() != first
