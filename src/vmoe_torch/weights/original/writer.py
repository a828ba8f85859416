"""Writes the original's sharded checkpoints, byte for byte as its own writer does on one process."""

import itertools
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from vmoe_torch.files import replacing
from vmoe_torch.weights.original.index import (
    CHUNKS_KEY,
    DTYPE_NAMES,
    DTYPES,
    MAX_SHARDS,
    SLICE_ND,
    Box,
    Index,
    Leaf,
    box_shape,
    pack_box,
    pack_index,
    pack_piece,
)
from vmoe_torch.weights.original.reader import shard_name
from vmoe_torch.weights.original.wire import CheckpointError, array_header, extension_header, map_header, pack
from vmoe_torch.weights.remote import is_remote

# What the original cuts chunks, and their flat pieces, down to.
MAX_CHUNK_BYTES = 256 << 20
MAX_PIECE_BYTES = 1 << 30


def write_original(
    prefix: str | os.PathLike,
    arrays: Mapping[str, Tensor],
    *,
    num_shards: int = 1,
    max_chunk_bytes: int | None = MAX_CHUNK_BYTES,
    empty: Mapping[str, dict | None] | None = None,
) -> None:
    """Writes PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.

    Args:
        prefix: local path that the files' names begin with; files of that name are replaced when all are written.
        arrays: path such as "params/Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel" -> tensor.
        num_shards: number of data files; chunks go to the one that is smallest so far.
        max_chunk_bytes: arrays above this are cut; None never cuts.
        empty: nodes of the tree without arrays, as `read_index(...).empty` has them.

    Raises:
        CheckpointError: if two paths collide or a dtype is not one that the format has.
        ValueError: if num_shards or max_chunk_bytes is out of range, or the prefix is no local one.
    """
    prefix = os.fspath(prefix)
    if is_remote(prefix) or not os.path.basename(prefix):
        raise ValueError(f"prefix must be a local path that ends in what the files' names begin with, got {prefix!r}")
    if not 1 <= num_shards <= MAX_SHARDS:
        raise ValueError(f"num_shards must be in 1..{MAX_SHARDS}, got {num_shards}")
    if max_chunk_bytes is not None and max_chunk_bytes < 1:
        raise ValueError(f"max_chunk_bytes must be at least 1, got {max_chunk_bytes}")
    sizes = [0] * num_shards
    leaves = []
    for path, tensor in sorted(arrays.items(), key=lambda item: item[0].split("/")):
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"leaf {path!r}: dtype must be one of {', '.join(DTYPES)}, got {tensor.dtype}")
        boxes = sorted(_cut(tuple(tensor.shape), tensor.element_size(), max_chunk_bytes))
        shards = []
        for box in boxes:
            shard = min(range(num_shards), key=lambda number: (sizes[number], number))
            sizes[shard] += math.prod(box_shape(box)) * tensor.element_size()
            shards.append(shard)
        leaves.append(Leaf(path, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], tuple(boxes), tuple(shards)))
    index = Index(num_shards, leaves, dict(empty or {}))
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    content = pack_index(index)
    with ExitStack() as stack:
        # Entered first, so replaced last.
        part = stack.enter_context(replacing(f"{prefix}.index"))
        Path(part).write_bytes(content)
        for shard in range(num_shards):
            part = stack.enter_context(replacing(shard_name(prefix, shard, num_shards)))
            with open(part, "wb") as file:
                write_shard(file, shard, leaves, arrays)


def _cut(shape: tuple[int, ...], itemsize: int, max_chunk_bytes: int | None) -> list[Box]:
    """Boxes of equal shape, at most so many bytes each; short dims are cut first, as the original does."""
    items = math.prod(shape)
    most = items if max_chunk_bytes is None else max(max_chunk_bytes // itemsize, 1)
    parts = [1] * len(shape)
    for size, dim in sorted((size, dim) for dim, size in enumerate(shape)):
        if items <= most:
            break
        if size > 1:
            fitting = (n for n in range(2, 10) if size % n == 0 and items // n <= most)
            parts[dim] = next(fitting, size)
            items /= parts[dim]
    cuts = [[(i * size // n, (i + 1) * size // n) for i in range(n)] for size, n in zip(shape, parts)]
    return list(itertools.product(*cuts))


def write_shard(file, shard: int, leaves: list[Leaf], arrays: Mapping[str, Tensor]) -> None:
    held = [(number, leaf) for number, leaf in enumerate(leaves) if shard in leaf.shards]
    file.write(map_header(1 + len(held)) + pack(CHUNKS_KEY) + pack(True))
    for number, leaf in held:
        boxes = [box for box, at in zip(leaf.boxes, leaf.shards) if at == shard]
        file.write(pack(str(number)) + array_header(len(boxes)))
        tensor = arrays[leaf.path].detach()
        for box in boxes:
            part = tensor[tuple(slice(start, stop) for start, stop in box)]
            # Cloned, as "contiguous" leaves the stride of a single element, which no view of bytes accepts.
            chunk = part.cpu().clone(memory_format=torch.contiguous_format).view(-1)
            raw = memoryview(chunk.view(torch.uint8).numpy()) if chunk.numel() else memoryview(b"")
            most = max(1, MAX_PIECE_BYTES // leaf.itemsize)
            starts = range(0, chunk.numel(), most)
            file.write(array_header(2) + array_header(len(starts)))
            for start in starts:
                count = min(most, chunk.numel() - start)
                file.write(pack_piece(leaf.dtype, count, leaf.itemsize))
                file.write(raw[start * leaf.itemsize : (start + count) * leaf.itemsize])
            slices = pack_box(box)
            file.write(extension_header(SLICE_ND, len(slices)) + slices)
