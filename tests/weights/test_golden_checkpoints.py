"""The original's own files: read bit by bit, and written again byte by byte."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN
from vmoe_torch.checkpoints import read_index, read_original, write_original
from vmoe_torch.weights.original import writer

FOLDER = GOLDEN / "checkpoints"
VARIANTS = json.loads((FOLDER / "manifest.json").read_text())["variants"]


def expected(variant: str) -> dict[str, np.ndarray]:
    """The arrays that the original read back."""
    with np.load(FOLDER / variant / "expected.npz") as file:
        return {name: file[name] for name in file.files}


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("variant", VARIANTS)
def test_reader_gives_the_bits_that_the_original_wrote(variant):
    got, want = read_original(str(FOLDER / variant / "ckpt")), expected(variant)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (tuple(got[name].shape), raw(got[name])) == (array.shape, array.tobytes()), name
        assert str(got[name].dtype) == f"torch.{VARIANTS[variant]['arrays'][name]['dtype']}", name


def test_reader_keeps_only_what_is_asked_for():
    prefix = str(FOLDER / "train_state" / "ckpt")
    got = read_original(prefix, keep=lambda path: path.startswith("params/"), threads=1)
    assert got.keys() == {name for name in expected("train_state") if name.startswith("params/")}
    assert raw(got["params/cls"]) == expected("train_state")["params/cls"].tobytes()


def test_index_keeps_nodes_without_arrays():
    index = read_index(str(FOLDER / "train_state" / "ckpt"))
    assert sorted(index.empty) == VARIANTS["train_state"]["empty_nodes"]


@pytest.mark.parametrize("variant", ["params_1shard", "params_3shards_chunked", "subchunks", "train_state"])
def test_writer_gives_the_bytes_that_the_original_wrote(variant, tmp_path, monkeypatch):
    if variant == "subchunks":
        monkeypatch.setattr(writer, "MAX_PIECE_BYTES", 1000)
    prefix = FOLDER / variant / "ckpt"
    write_original(
        tmp_path / "ckpt",
        read_original(str(prefix)),
        empty=read_index(str(prefix)).empty,
        **VARIANTS[variant]["save_kwargs"],
    )
    for name in VARIANTS[variant]["files"]:
        if name.startswith("ckpt"):
            got, want = (tmp_path / name).read_bytes(), (FOLDER / variant / name).read_bytes()
            if (variant, name) == ("train_state", "ckpt.index"):
                # JAX's weak_type of the step, the one thing that tensors do not carry.
                assert sum(a != b for a, b in zip(got, want, strict=True)) == 1
            else:
                assert got == want, name


@pytest.mark.parametrize("max_chunk_bytes", [None, 1, 7, 64])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_dtype_and_odd_shape_comes_back(num_shards, max_chunk_bytes, tmp_path):
    shapes = ((), (0,), (3, 0, 2), (1,), (13,), (5, 1, 7))
    arrays = {}
    for dtype in writer.DTYPE_NAMES:
        for shape in shapes:
            data = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
            arrays[f"{writer.DTYPE_NAMES[dtype]}/x{len(shape)}_{data.numel()}"] = data.to(dtype)
    arrays["transposed"] = torch.randn(6, 10).t()
    write_original(tmp_path / "a" / "x", arrays, num_shards=num_shards, max_chunk_bytes=max_chunk_bytes)
    got = read_original(str(tmp_path / "a" / "x"))
    assert got.keys() == arrays.keys()
    for name, tensor in arrays.items():
        assert (got[name].shape, got[name].dtype, raw(got[name])) == (tensor.shape, tensor.dtype, raw(tensor)), name
    assert not list(Path(tmp_path / "a").glob("*.part"))


def test_leaves_without_version_follow_the_train_state(tmp_path):
    """Such files number step, params, opt_state, rngs in this order, and the parts of opt_state as a tuple."""
    paths = ("opt_state/10/count", "opt_state/2/mu/w", "opt_state/2/nu/w", "params/w10", "params/w2", "rngs/a", "step")
    arrays = {path: torch.full((2,), float(number)) for number, path in enumerate(paths)}
    write_original(tmp_path / "x", arrays)
    index = (tmp_path / "x.index").read_bytes()
    (tmp_path / "x.index").write_bytes(b"\x82" + index[1:].removesuffix(b"\xa7version\xa820220622"))
    got = read_original(str(tmp_path / "x"))
    order = ["step", "params/w10", "params/w2", "opt_state/2/mu/w", "opt_state/2/nu/w", "opt_state/10/count", "rngs/a"]
    assert list(got) == order
    assert [int(tensor[0]) for tensor in got.values()] == list(range(len(order)))


@pytest.mark.parametrize("num_shards", [1, 4])
def test_peak_memory_is_the_result_and_a_chunk_per_thread(num_shards, tmp_path):
    # Chunks of the second kind do not lie together in their array.
    arrays = {f"w{i}": torch.randn(1 << 10, 1 << 10) for i in range(4)} | {"wide": torch.randn(1 << 9, 1 << 11, 4)}
    write_original(tmp_path / "x", arrays, num_shards=num_shards, max_chunk_bytes=1 << 20)
    size = sum(tensor.nbytes for tensor in arrays.values())
    tracemalloc.start()
    got = read_original(str(tmp_path / "x"), threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(torch.equal(got[name], tensor) for name, tensor in arrays.items())
    assert size <= peak < size + (4 << 20)


def test_fsspec_urls_are_read(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    prefix = FOLDER / "params_3shards_chunked"
    for path in prefix.glob("ckpt.*"):
        memory.pipe(f"/checkpoints/{path.name}", path.read_bytes())
    got = read_original("memory://checkpoints/ckpt", progress=True)
    want = expected("params_3shards_chunked")
    assert all(raw(got[name]) == array.tobytes() for name, array in want.items())


def test_writer_refuses_paths_that_collide(tmp_path):
    with pytest.raises(ValueError, match="paths must end in one array each, got 'a/b'"):
        write_original(tmp_path / "x", {"a": torch.zeros(1), "a/b": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"num_shards must be in 1\.\.99999, got 0"):
        write_original(tmp_path / "x", {}, num_shards=0)
    with pytest.raises(ValueError, match="leaf 'a': dtype must be one of"):
        write_original(tmp_path / "x", {"a": torch.empty(1, dtype=torch.float8_e5m2fnuz)})


@pytest.mark.parametrize("prefix", ["", "http://localhost/x", "gs://bucket/x"])
def test_writer_refuses_what_is_no_local_name(prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="prefix must be a local path that ends in what the files' names begin with"):
        write_original(prefix, {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    write_original(tmp_path / "x", {"a": torch.zeros(4), "b": torch.zeros(4)}, num_shards=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = writer.write_shard

    def full(file, shard, *rest):
        if shard == 1:
            raise OSError(28, "No space left on device")
        real(file, shard, *rest)

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        write_original(tmp_path / "x", {"a": torch.ones(4), "b": torch.ones(4)}, num_shards=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
