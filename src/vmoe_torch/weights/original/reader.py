"""Reads the original's sharded checkpoints: PREFIX.index and PREFIX.data-nnnnn-of-NNNNN, without JAX.

A data shard is one msgpack map from a leaf's number to its chunks, [[flat pieces], slices] each. Shards are first
scanned for where their pieces lie, all of it checked against the index, and only then is memory allocated and filled
by reading straight into it: the peak is the result, plus a chunk per thread where one is not contiguous in its array.
"""

import math
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from vmoe_torch.weights.original.index import (
    CHUNKS_KEY,
    DTYPES,
    MAX_DIMS,
    NDARRAY,
    SLICE_ND,
    Box,
    Index,
    Leaf,
    box_shape,
    parse_index,
    read_box,
)
from vmoe_torch.weights.original.wire import CheckpointError, Cursor, Window
from vmoe_torch.weights.remote import is_remote, local_copy, progress_bar

# Bytes that a thread reads before it takes the next task.
_TASK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a leaf in a shard: offsets and sizes of its flat pieces, in order."""

    leaf: int
    """Number of the leaf."""
    box: Box
    """Part of the array that it is."""
    pieces: tuple[tuple[int, int], ...]
    """(offset, size) in bytes."""


def shard_name(prefix: str, shard: int, shard_count: int) -> str:
    """File of a data shard."""
    return f"{prefix}.data-{shard:05d}-of-{shard_count:05d}"


def read_index(prefix: str) -> Index:
    """The index of the checkpoint at a local path or URL.

    Args:
        prefix: what the names of its files begin with.

    Raises:
        CheckpointError: if the index is missing or damaged.
    """
    with ExitStack() as stack:
        path = _local(f"{prefix}.index", stack, progress=False)
        return _parse(path)


def _parse(path: str) -> Index:
    with _opened(path) as file:
        return parse_index(file.read(), path)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file, unbuffered."""
    try:
        # What a pipe or a device gives might never come, or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("what is no regular file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} must be a readable file, got {error}") from None


def read_original(
    prefix: str,
    *,
    keep: Callable[[str], bool] | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Reads a checkpoint of the original, parameters alone or a whole train state.

    Args:
        prefix: what the names of its files begin with: a local path, an https:// or gs:// URL, or any fsspec URL.
        keep: whether to read the array at a path such as "params/Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"; the
            others are checked but neither read nor allocated. None reads all.
        threads: that read at the same time; None is two per core, as one waits while the other copies, 8 at most.
        progress: whether to show a bar.

    Returns:
        Path of each array -> tensor of the shape and dtype it was saved with, in the order of the file.

    Raises:
        CheckpointError: naming the file and the leaf, if anything is damaged, missing, or not as declared. Nothing is
            allocated that the bytes present do not fill.
    """
    threads = threads or min(8, 2 * (os.cpu_count() or 1))
    with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        index = _parse(_local(f"{prefix}.index", stack, progress))
        names = {shard: shard_name(prefix, shard, index.shard_count) for leaf in index.leaves for shard in leaf.shards}
        files = {shard: _local(name, stack, progress) for shard, name in sorted(names.items())}
        scanned = dict(zip(files, pool.map(lambda shard: scan_shard(files[shard], shard, index), files)))
        # Every leaf's bytes are now known to lie in the files, each once.
        wanted = [keep is None or keep(leaf.path) for leaf in index.leaves]
        arrays = [
            np.empty(leaf.shape, DTYPES[leaf.dtype][0]) if want else None for leaf, want in zip(index.leaves, wanted)
        ]
        total = sum(array.nbytes for array in arrays if array is not None)
        advance = stack.enter_context(progress_bar(progress, total, "reading"))
        tasks = [
            (files[shard], task)
            for shard, chunks in scanned.items()
            for task in _tasks([chunk for chunk in chunks if wanted[chunk.leaf]])
        ]
        for size in pool.map(lambda task: _fill(*task, index.leaves, arrays), tasks):
            advance(size)
    result = {}
    for number, leaf in enumerate(index.leaves):
        if wanted[number]:
            # Dropped one by one so that nothing is held twice.
            result[leaf.path] = torch.from_numpy(arrays[number]).view(DTYPES[leaf.dtype][1])
            arrays[number] = None
    return result


def _local(path: str, stack: ExitStack, progress: bool) -> str:
    return stack.enter_context(local_copy(path, progress)) if is_remote(path) else path


def scan_shard(path: str, shard: int, index: Index) -> list[Chunk]:
    """Where the chunks of a data shard lie; every one checked against the index, and none missing.

    Args:
        path: the file.
        shard: its number.
        index: of the checkpoint.

    Raises:
        CheckpointError: naming the file and the leaf.
    """
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)

        def read(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        return _scan(Cursor(Window(read, size, path)), shard, index)


def _scan(cursor: Cursor, shard: int, index: Index) -> list[Chunk]:
    expected = {
        (number, box)
        for number, leaf in enumerate(index.leaves)
        for box, at in zip(leaf.boxes, leaf.shards)
        if at == shard
    }
    chunks = []
    for position in range(cursor.count("map", "a data shard")):
        key = cursor.text("a key of a data shard")
        if key == CHUNKS_KEY:
            if position or not cursor.boolean(key):
                raise cursor.fail(f"{CHUNKS_KEY} must come first and be true", position)
            continue
        if not (key.isascii() and key.isdecimal()) or int(key) >= len(index.leaves):
            raise cursor.fail(f"a leaf's number must be in 0..{len(index.leaves) - 1}", key)
        number = int(key)
        leaf = index.leaves[number]
        cursor.about = leaf.path
        for _ in range(cursor.count("array", "a leaf's chunks")):
            chunk = _scan_chunk(cursor, number, leaf)
            if (number, chunk.box) not in expected:
                raise cursor.fail("a chunk must be one that the index has in this shard, once", chunk.box)
            expected.remove((number, chunk.box))
            chunks.append(chunk)
        cursor.about = ""
    cursor.done("a data shard")
    if expected:
        number, box = min(expected)
        cursor.about = index.leaves[number].path
        raise cursor.fail("a data shard must hold every chunk that the index has in it", f"no {box}")
    return chunks


def _scan_chunk(cursor: Cursor, number: int, leaf: Leaf) -> Chunk:
    cursor.count("array", "a chunk", exactly=2)
    pieces = []
    for _ in range(cursor.count("array", "a chunk's pieces")):
        piece = cursor.extension(NDARRAY, "a piece")
        piece.count("array", "a piece", exactly=3)
        dims = piece.count("array", "shape of a piece")
        if dims > MAX_DIMS:
            raise piece.fail(f"pieces must have at most {MAX_DIMS} dims", dims)
        shape = tuple(piece.integer("a dim of a piece") for _ in range(dims))
        dtype = piece.text("dtype of a piece")
        if dtype != leaf.dtype:
            raise piece.fail(f"dtype of a piece must be the leaf's {leaf.dtype}", dtype)
        offset, size = piece.blob("bytes of a piece")
        piece.done("a piece")
        if any(dim < 0 for dim in shape) or math.prod(shape) * leaf.itemsize != size:
            raise piece.fail(f"a piece of shape {shape} and dtype {dtype} must fit its bytes", size)
        pieces.append((offset, size))
    box = read_box(cursor.extension(SLICE_ND, "a chunk's slices"), leaf.shape)
    declared = math.prod(box_shape(box)) * leaf.itemsize
    held = sum(size for _, size in pieces)
    if held != declared:
        raise cursor.fail(f"a chunk of {declared} bytes must have them", f"{held} bytes")
    return Chunk(number, box, tuple(pieces))


def _tasks(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    task, size = [], 0
    for chunk in chunks:
        task.append(chunk)
        size += sum(nbytes for _, nbytes in chunk.pieces)
        if size >= _TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _fill(path: str, chunks: list[Chunk], leaves: list[Leaf], arrays: list[np.ndarray | None]) -> int:
    """Reads chunks into their arrays; returns how many bytes."""
    total = 0
    with _opened(path) as file:
        for chunk in chunks:
            leaf, array = leaves[chunk.leaf], arrays[chunk.leaf]
            # The ellipsis keeps a scalar's part a view.
            part = array[(*(slice(start, stop) for start, stop in chunk.box), ...)]
            direct = part.flags.c_contiguous
            flat = (part if direct else np.empty(part.shape, part.dtype)).reshape(-1)
            raw = flat.view(np.uint8)
            begin = 0
            for offset, size in chunk.pieces:
                _read_into(file, offset, memoryview(raw)[begin : begin + size], leaf.path)
                begin += size
            if leaf.dtype == "bool" and raw.size and raw.max() > 1:
                raise CheckpointError(f"{path}: leaf {leaf.path!r}: bytes of bool must be 0 or 1, got {raw.max()}")
            if not direct:
                part[...] = flat.reshape(part.shape)
            total += begin
    return total


def _read_into(file, offset: int, view: memoryview, path: str) -> None:
    file.seek(offset)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{file.name}: leaf {path!r}: the file must not shrink while it is read")
        view = view[count:]
