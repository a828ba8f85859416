"""Damaged and hostile files: one clear error, whatever the bytes, and no memory that they do not pay for."""

import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDEN
from tests.weights.fuzz_reader import SEEDS, one_input
from vmoe_torch.checkpoints import CheckpointError, read_original, write_original
from vmoe_torch.weights.original import index
from vmoe_torch.weights.original.index import INDEX_INFO
from vmoe_torch.weights.original.wire import array_header, extension_header, map_header, pack

SOURCE = GOLDEN / "checkpoints" / "params_3shards_chunked"
SHARD = "ckpt.data-00001-of-00003"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(SOURCE, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _refused(folder: Path, pattern: str, name: str = "ckpt") -> None:
    with pytest.raises(CheckpointError, match=pattern):
        read_original(str(folder / name))


def _info(shape, dtype="float32", boxes=None, shards=None, extra=b"") -> bytes:
    boxes = [tuple((0, size) for size in shape)] if boxes is None else boxes
    shards = [0] * len(boxes) if shards is None else shards
    body = pack([pack([shape, dtype, False, {}]), [index.pack_box(box) for box in boxes], shards]) + extra
    return extension_header(INDEX_INFO, len(body)) + body


def _index(tree: bytes, shard_count=1) -> bytes:
    pairs = pack("shard_count") + pack(shard_count) + pack("index") + tree + pack("version") + pack(index.VERSION)
    return map_header(3) + pairs


def _write(folder: Path, tree: bytes, shard: bytes = b"\x80", **kwargs) -> None:
    (folder / "x.index").write_bytes(_index(tree, **kwargs))
    (folder / "x.data-00000-of-00001").write_bytes(shard)


def _one(name: str, leaf: bytes) -> bytes:
    return map_header(1) + pack(name) + leaf


def test_missing_files_are_named(folder):
    (folder / SHARD).unlink()
    _refused(folder, f"{SHARD} must be a readable file")
    (folder / "ckpt.index").unlink()
    _refused(folder, r"ckpt\.index must be a readable file")


@pytest.mark.parametrize("name", ["ckpt.index", SHARD])
def test_truncation_anywhere_is_refused(folder, name):
    data = (folder / name).read_bytes()
    for size in (*range(0, 64), *range(64, len(data), len(data) // 20), len(data) - 1):
        (folder / name).write_bytes(data[:size])
        _refused(folder, name)


@pytest.mark.parametrize("name", ["ckpt.index", SHARD])
def test_bytes_after_the_end_are_refused(folder, name):
    with open(folder / name, "ab") as file:
        file.write(b"\0")
    _refused(folder, f"{name}.* must end here, got '1 more bytes'")


def test_shards_of_another_checkpoint_are_refused(folder):
    shutil.copy(folder / "ckpt.data-00000-of-00003", folder / SHARD)
    _refused(folder, f"{SHARD}: leaf 'Encoder/.*': a chunk must be one that the index has in this shard")
    shutil.copy(GOLDEN / "checkpoints/subchunks/ckpt.data-00000-of-00001", folder / SHARD)
    _refused(folder, f"{SHARD}: leaf ")


@pytest.mark.parametrize(
    ("boxes", "pattern"),
    [
        ([((0, 4),), ((2, 6),)], "without gap or overlap"),
        ([((0, 2),), ((3, 6),)], "without gap or overlap"),
        ([((0, 3),), ((0, 3),), ((3, 6),)], "2 cells of a grid"),
        ([((0, 5),)], "cover 0..6 of dim 0"),
        ([((0, 7),)], r"a slice must lie in 0..6"),
        ([((4, 2),)], r"a slice must lie in 0..6"),
        ([], "cover 0..6 of dim 0"),
        ([((0, 6), (0, 1))], "a chunk's slices must have 1 elements"),
    ],
)
def test_chunks_that_do_not_tile_are_refused(tmp_path, boxes, pattern):
    _write(tmp_path, _one("w", _info((6,), boxes=boxes)))
    _refused(tmp_path, f"x.index: leaf 'w': .*{pattern}", "x")


@pytest.mark.parametrize(
    ("leaf", "pattern"),
    [
        (_info((2**40,)), "x.data-00000-of-00001: leaf 'w': a data shard must hold every chunk"),
        (_info((2**60,)), "leaf 'w': a data shard must hold every chunk"),
        (_info((2**62, 2**62)), "an array's bytes must fit 64 bits"),
        (_info((2**61, 0)), "an array's bytes must fit 64 bits"),
        (_info((0, 2**64 - 1)), "an array's bytes must fit 64 bits"),
        (_info((-1,), boxes=[((0, 0),)]), "dims must be at least 0"),
        (_info((1,) * 17), "at most 16 dims"),
        (_info((1,), dtype="object"), "dtype must be one of"),
        (_info((1,), shards=[1]), r"shards must be in 0\.\.0"),
        (_info((1,), shards=[]), "shards must have 1 elements"),
        (_info((1,), extra=b"\xc0"), "IndexInfo must end here"),
        (extension_header(7, 1) + b"\xc0", "extension type 8"),
        (pack([1, 2]), "a node must be a map, nil or extension type 8"),
        (b"\xdf\xff\xff\xff\xff", "must fit the file"),
        (b"\xc9\xff\xff\xff\xff\x08", "the file must hold what its headers say"),
        (b"\xc1", "types that the format has"),
    ],
)
def test_leaves_that_lie_are_refused(tmp_path, leaf, pattern):
    _write(tmp_path, _one("w", leaf))
    _refused(tmp_path, pattern, "x")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "..\\a", "a\0b", "a" * 300])
def test_names_that_leave_the_tree_are_refused(tmp_path, name):
    _write(tmp_path, _one(name, _info((1,))))
    _refused(tmp_path, "x.index.*(plain names|at most 256 bytes)", "x")


def test_repeated_names_are_refused(tmp_path):
    _write(tmp_path, map_header(2) + (pack("w") + _info((1,))) * 2)
    _refused(tmp_path, "paths must be unique", "x")


def test_deep_trees_are_refused(tmp_path):
    _write(tmp_path, (map_header(1) + pack("a")) * 100_000 + _info((1,)))
    _refused(tmp_path, "at most 32 levels deep", "x")


@pytest.mark.parametrize("count", [0, -1, 100_000, 2**60])
def test_shard_counts_out_of_range_are_refused(tmp_path, count):
    _write(tmp_path, _one("w", _info((1,))), shard_count=count)
    _refused(tmp_path, r"shard_count must be in 1\.\.99999", "x")


def test_unknown_versions_are_refused(folder):
    data = (folder / "ckpt.index").read_bytes()
    (folder / "ckpt.index").write_bytes(data.replace(b"20220622", b"20990101"))
    _refused(folder, "version must be '20220622' or absent, got '20990101'")


@pytest.mark.parametrize(("count", "box"), [(2, ((0, 3),)), (4, ((0, 3),)), (3, ((0, 2),)), (0, ((0, 3),))])
def test_chunks_of_another_size_are_refused(tmp_path, count, box):
    """A piece that is sound in itself but does not fill its chunk would leave memory as it was."""
    body = index.pack_piece("float32", count, 4) + bytes(4 * count)
    slices = index.pack_box(box)
    chunk = array_header(2) + array_header(1) + body + extension_header(index.SLICE_ND, len(slices)) + slices
    shard = map_header(2) + pack(index.CHUNKS_KEY) + pack(True) + pack("0") + array_header(1) + chunk
    _write(tmp_path, _one("w", _info((3,))), shard)
    _refused(tmp_path, "leaf 'w': a chunk ", "x")


def test_pieces_of_many_dims_are_refused_at_once(tmp_path):
    """Their product alone, numbers of 64 bits each, would take minutes."""
    dims = 1_000_000
    inner = array_header(3) + array_header(dims) + (b"\xcf" + b"\xff" * 8) * dims + pack("float32") + b"\xc4\x00"
    slices = index.pack_box(((0, 3),))
    chunk = array_header(2) + array_header(1) + extension_header(index.NDARRAY, len(inner)) + inner
    chunk += extension_header(index.SLICE_ND, len(slices)) + slices
    shard = map_header(2) + pack(index.CHUNKS_KEY) + pack(True) + pack("0") + array_header(1) + chunk
    _write(tmp_path, _one("w", _info((3,))), shard)
    _refused(tmp_path, "leaf 'w': pieces must have at most 16 dims, got 1000000", "x")


def test_bytes_that_are_no_bool_are_refused(tmp_path):
    write_original(tmp_path / "x", {"w": torch.tensor([True, False])})
    path = tmp_path / "x.data-00000-of-00001"
    path.write_bytes(path.read_bytes().replace(b"bool\xc4\x02\x01\x00", b"bool\xc4\x02\x07\x00"))
    _refused(tmp_path, "leaf 'w': bytes of bool must be 0 or 1, got 7", "x")


def test_declared_sizes_allocate_nothing(tmp_path):
    """Nested arrays that each declare all that is left, and a leaf of 4 TiB."""
    bombs = [_one("w", _info((2**40,))), b"\xdd\x00\x0f\x00\x00" * 1000 + b"\x90" * 1_000_000]
    for tree in bombs:
        for shard in (b"\x80", b"\x81\xa10" + b"\xdd\x00\x0f\x00\x00" * 500 + b"\x90" * 1_000_000):
            _write(tmp_path, tree, shard)
            tracemalloc.start()
            _refused(tmp_path, "x\\.", "x")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 << 20


def test_short_names_below_a_long_one_allocate_little(tmp_path):
    """A node of 6 bytes has a path of 500."""
    nodes = map_header(100_000) + b"".join(pack(f"{number:x}") + b"\xc0" for number in range(100_000))
    _write(tmp_path, _one("a" * 250, _one("b" * 250, nodes)))
    tracemalloc.start()
    _refused(tmp_path, "the tree must have at most 65536 nodes", "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20


@pytest.mark.parametrize("name", ["ckpt.index", SHARD])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling"])
def test_what_is_no_regular_file_is_refused(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else folder / "none")
    _refused(folder, f"{name} must be a readable file, got")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, bytes]:
    """A small checkpoint with cut arrays, a scalar, an empty array and an empty node, as file name -> bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    arrays = {
        "a/w": torch.arange(24.0).view(4, 6),
        "a/b": torch.arange(3).to(torch.bfloat16),
        "s": torch.tensor(7, dtype=torch.int32),
        "z": torch.zeros(0, 2),
    }
    write_original(folder / "x", arrays, num_shards=2, max_chunk_bytes=16, empty={"e": {}})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


_EDIT = st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8))


@settings(max_examples=400, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(_EDIT, min_size=1, max_size=4))
def test_edited_files_never_crash(tiny, tmp_path, edits):
    """Cuts and insertions anywhere: an error of ours, or arrays that the files' bytes fill."""
    files = {name: bytearray(data) for name, data in sorted(tiny.items())}
    for which, where, removed, inserted in edits:
        data = files[sorted(files)[which]]
        at = int(where * len(data))
        data[at : at + removed] = inserted
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    size = sum(map(len, files.values()))
    tracemalloc.start()
    try:
        got, said = read_original(str(tmp_path / "x"), threads=1), str(tmp_path / "x.")
    except CheckpointError as error:
        got, said = {}, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(tmp_path / "x.") in said
    assert sum(tensor.nbytes for tensor in got.values()) <= size
    # Windows of 64 KiB, and the objects that stand for what was read.
    assert peak < 512 * 1024 + 64 * size


def test_array_headers_hold_any_count():
    assert [array_header(count)[0] for count in (15, 16, 1 << 16)] == [0x9F, 0xDC, 0xDD]


@pytest.mark.parametrize("seed", sorted(SEEDS.glob("*.bin")), ids=lambda path: path.stem)
def test_fuzzing_seeds_are_read(seed, tmp_path):
    data = seed.read_bytes()
    size = int.from_bytes(data[:2], "big")
    one_input(data, tmp_path)
    assert (tmp_path / "x.index").read_bytes() == data[2 : 2 + size]
    assert read_original(str(tmp_path / "x"))
