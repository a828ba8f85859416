"""The index of the original's checkpoints: which arrays there are, how they are cut, and which shard holds each chunk.

PREFIX.index is one msgpack map {"shard_count", "index", "version"}; "index" is the tree of parameters with an IndexInfo
at each leaf. Leaves are numbered, and the data shards know them by their number only.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from vmoe_torch.weights.original.wire import (
    CheckpointError,
    Cursor,
    Window,
    array_header,
    blob_header,
    extension_header,
    map_header,
    pack,
)

NDARRAY, SLICE_ND, INDEX_INFO = 1, 6, 8
VERSION = "20220622"
# Key that marks a data shard's map.
CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"
# Fields of the original's train state, in the order in which files without a version number their leaves.
_STATE_FIELDS = ("step", "params", "opt_state", "rngs")
MAX_DEPTH, MAX_PATH, MAX_DIMS, MAX_SHARDS = 32, 512, 16, 99_999
# A path takes a hundred times the bytes that a short name below a long one takes in the file.
MAX_NODES = 1 << 16

# numpy's name of a dtype -> how its bytes are held, and torch's dtype.
DTYPES = {
    **{name: (np.dtype(name), getattr(torch, name)) for name in ("float16", "float32", "float64", "bool")},
    **{name: (np.dtype(name), getattr(torch, name)) for name in ("int8", "int16", "int32", "int64")},
    **{name: (np.dtype(name), getattr(torch, name)) for name in ("uint8", "uint16", "uint32", "uint64")},
    **{name: (np.dtype(name), getattr(torch, name)) for name in ("complex64", "complex128")},
    "bfloat16": (np.dtype("uint16"), torch.bfloat16),
    "float8_e4m3fn": (np.dtype("uint8"), torch.float8_e4m3fn),
    "float8_e5m2": (np.dtype("uint8"), torch.float8_e5m2),
}
DTYPE_NAMES = {torch_dtype: name for name, (_, torch_dtype) in DTYPES.items()}

# One (start, stop) for every dim.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array: where it stands in the tree, what it is, and the shard that holds each of its chunks."""

    path: str
    """Place in the tree, as "params/Encoder/encoder_norm/scale"."""
    shape: tuple[int, ...]
    """Shape of the whole array."""
    dtype: str
    """numpy's name of the dtype."""
    boxes: tuple[Box, ...]
    """Part of the array that each chunk is."""
    shards: tuple[int, ...]
    """Shard that holds each chunk."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][0].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.itemsize


@dataclass
class Index:
    """All leaves by their number, and the nodes of the tree that hold none ({} or None)."""

    shard_count: int
    """Number of data shards beside the index."""
    leaves: list[Leaf]
    """All arrays, in the order of their numbers."""
    empty: dict[str, dict | None] = field(default_factory=dict)
    """Nodes that hold no array: path -> {} or None."""
    version: str | None = VERSION
    """Version of the format; None in files from before there was one."""


def box_shape(box: Box) -> tuple[int, ...]:
    """Shape of a chunk."""
    return tuple(stop - start for start, stop in box)


def read_box(cursor: Cursor, shape: tuple[int, ...]) -> Box:
    """Reads a SliceNd's bytes: slices of step 1, within the array."""
    cursor.count("array", "a chunk's slices", exactly=len(shape))
    box = []
    for size in shape:
        part = cursor.inside(*cursor.blob("a slice"))
        part.count("array", "a slice", exactly=3)
        bounds = [part.header() for _ in range(3)]
        if any(kind not in ("int", "nil") for kind, _ in bounds):
            raise cursor.fail("a slice must be of integers or nil", [kind for kind, _ in bounds])
        (_, start), (_, stop), (_, step) = bounds
        part.done("a slice")
        start, stop = start or 0, size if stop is None else stop
        if step not in (None, 1) or not 0 <= start <= stop <= size:
            raise cursor.fail(f"a slice must lie in 0..{size} with step 1", (start, stop, step))
        box.append((start, stop))
    return tuple(box)


def parse_index(data: bytes, name: str) -> Index:
    """Reads and checks the bytes of an index file.

    Args:
        data: all bytes of the file.
        name: of the file, for errors.

    Returns:
        The index, leaves in the order of their numbers; the chunks of every leaf tile it exactly.

    Raises:
        CheckpointError: naming the file and the leaf, whatever the bytes are.
    """
    cursor = Cursor(Window.of(data, name))
    shard_count = version = tree = None
    seen = set()
    for _ in range(cursor.count("map", "the index file")):
        key = cursor.text("a key of the index file")
        if key in seen:
            raise cursor.fail("keys must be unique", key)
        seen.add(key)
        if key == "shard_count":
            shard_count = cursor.integer(key)
        elif key == "version":
            version = cursor.text(key)
        elif key == "index":
            tree = ([], {})
            _parse_tree(cursor, (), *tree)
        else:
            raise cursor.fail("keys must be shard_count, index and version", key)
    cursor.done("the index file")
    if shard_count is None or tree is None:
        raise cursor.fail("the index file must have shard_count and index", sorted(seen))
    if "version" in seen and version != VERSION:
        raise cursor.fail(f"version must be {VERSION!r} or absent", version)
    if not 1 <= shard_count <= MAX_SHARDS:
        raise cursor.fail(f"shard_count must be in 1..{MAX_SHARDS}", shard_count)
    leaves, empty = tree
    for _, leaf in leaves:
        if any(not 0 <= shard < shard_count for shard in leaf.shards):
            cursor.about = leaf.path
            raise cursor.fail(f"shards must be in 0..{shard_count - 1}", leaf.shards)
    if len({leaf.path for _, leaf in leaves} | empty.keys()) < len(leaves) + len(empty):
        raise cursor.fail("paths must be unique", "a repeated path")
    leaves.sort(key=(lambda item: item[0]) if version else (lambda item: _legacy_order(item[0])))
    return Index(shard_count, [leaf for _, leaf in leaves], empty, version)


def _legacy_order(keys: tuple[str, ...]) -> tuple:
    """Files without a version number leaves as the train state has them: fields and tuples in order, dicts sorted."""
    first = _STATE_FIELDS.index(keys[0]) if keys[0] in _STATE_FIELDS else len(_STATE_FIELDS)
    if keys[0] != "opt_state":
        return first, keys
    return first, tuple((0, int(key), "") if key.isdecimal() else (1, 0, key) for key in keys)


def _parse_tree(cursor: Cursor, keys: tuple[str, ...], leaves: list, empty: dict) -> None:
    if len(keys) > MAX_DEPTH:
        raise cursor.fail(f"the tree must be at most {MAX_DEPTH} levels deep", len(keys))
    path = "/".join(keys)
    count = cursor.count("map", "a node of the tree")
    if count == 0:
        empty[path] = {}
    for _ in range(count):
        if len(leaves) + len(empty) >= MAX_NODES:
            raise cursor.fail(f"the tree must have at most {MAX_NODES} nodes without others below", "more")
        cursor.about = path
        key = cursor.text("a key of the tree")
        if key in ("", ".", "..") or not key.isprintable() or "/" in key or "\\" in key:
            raise cursor.fail("keys must be plain names, without slashes or dots alone", key)
        below = (*keys, key)
        cursor.about = name = f"{path}/{key}" if keys else key
        if len(name) > MAX_PATH:
            raise cursor.fail(f"paths must have at most {MAX_PATH} characters", len(name))
        begin = cursor.position
        kind, value = cursor.header()
        if kind == "map":
            cursor.position = begin
            _parse_tree(cursor, below, leaves, empty)
        elif kind == "nil":
            empty[name] = None
        elif kind == "ext" and value[0] == INDEX_INFO:
            leaves.append((below, _parse_leaf(cursor.inside(cursor.skip(value[1]), value[1]), name)))
        else:
            raise cursor.fail(f"a node must be a map, nil or extension type {INDEX_INFO}", (kind, value))


def _parse_leaf(cursor: Cursor, path: str) -> Leaf:
    cursor.count("array", "IndexInfo", exactly=3)
    array = cursor.inside(*cursor.blob("an array's shape and dtype"))
    # Shape, dtype, weak_type, and what JAX once called the named shape.
    array.count("array", "an array's shape and dtype", exactly=4)
    dims = array.count("array", "shape")
    if dims > MAX_DIMS:
        raise array.fail(f"arrays must have at most {MAX_DIMS} dims", dims)
    shape = tuple(array.integer("a dim") for _ in range(dims))
    if any(dim < 0 for dim in shape):
        raise array.fail("dims must be at least 0", shape)
    dtype = array.text("dtype")
    if dtype not in DTYPES:
        raise array.fail(f"dtype must be one of {', '.join(DTYPES)}", dtype)
    # Dims of 0 do not help: strides must fit 64 bits too.
    if math.prod(max(dim, 1) for dim in shape) * DTYPES[dtype][0].itemsize >= 1 << 63:
        raise array.fail("an array's bytes must fit 64 bits", shape)
    array.boolean("weak_type")
    array.count("map", "named shape", exactly=0)
    array.done("an array's shape and dtype")

    count = cursor.count("array", "chunks")
    boxes = []
    for _ in range(count):
        part = cursor.inside(*cursor.blob("a chunk's slices"))
        boxes.append(read_box(part, shape))
        part.done("a chunk's slices")
    cursor.count("array", "shards", exactly=count)
    shards = tuple(cursor.integer("a shard") for _ in range(count))
    cursor.done("IndexInfo")
    _check_tiling(cursor, shape, boxes)
    return Leaf(path, shape, dtype, tuple(boxes), shards)


def _check_tiling(cursor: Cursor, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """The chunks are all the cells of one grid: neither a gap nor an overlap, found in linear time."""
    cells = 1
    for dim, size in enumerate(shape):
        cuts = sorted({box[dim] for box in boxes})
        ends = [0, *(stop for _, stop in cuts)]
        if not cuts or ends[-1] != size or [start for start, _ in cuts] != ends[:-1]:
            raise cursor.fail(f"chunks must cover 0..{size} of dim {dim} without gap or overlap", cuts)
        cells *= len(cuts)
    if len(set(boxes)) != len(boxes) or len(boxes) != cells:
        raise cursor.fail(f"chunks must be the {cells} cells of a grid, each once", f"{len(boxes)} chunks")


def pack_box(box: Box) -> bytes:
    """A SliceNd's bytes."""
    return pack([pack([start, stop, None]) for start, stop in box])


def pack_index(index: Index) -> bytes:
    """The bytes of an index file."""
    tree: dict = {}
    for path, node in index.empty.items():
        _place(tree, path, node)
    for leaf in index.leaves:
        _place(tree, leaf.path, leaf)
    version = {} if index.version is None else {"version": index.version}
    head = map_header(2 + len(version)) + pack("shard_count") + pack(index.shard_count) + pack("index")
    return head + _pack_tree(tree) + b"".join(pack(item) for pair in version.items() for item in pair)


def _place(tree: dict, path: str, node) -> None:
    *above, name = path.split("/")
    for key in above:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise CheckpointError(f"paths must end in one array each, got {path!r} below one")
    if name in tree:
        raise CheckpointError(f"paths must end in one array each, got {path!r} above or beside one")
    tree[name] = node


def _pack_tree(node) -> bytes:
    if isinstance(node, Leaf):
        body = pack(
            [
                pack([node.shape, node.dtype, False, {}]),
                [pack_box(box) for box in node.boxes],
                node.shards,
            ]
        )
        return extension_header(INDEX_INFO, len(body)) + body
    if node is None:
        return pack(None)
    return map_header(len(node)) + b"".join(pack(key) + _pack_tree(node[key]) for key in sorted(node))


def pack_piece(dtype: str, count: int, itemsize: int) -> bytes:
    """What stands before the bytes of a flat ndarray."""
    inner = array_header(3) + pack([count]) + pack(dtype)
    nbytes = count * itemsize
    sized = blob_header(nbytes)
    return extension_header(NDARRAY, len(inner) + len(sized) + nbytes) + inner + sized
