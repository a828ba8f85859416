"""The IDX format of MNIST and its successors: a big-endian header, then unsigned bytes; gz-compressed or not.

Header: two zero bytes, the type (8 is unsigned byte), the number of dims, then each dim as a 4-byte integer.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from vmoe_torch.files import replacing

_UNSIGNED_BYTE = 8


def read_idx(path: Path | str) -> np.ndarray:
    """Reads an IDX file of unsigned bytes.

    Args:
        path: the file; gz-compressed if its name ends in .gz.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        ValueError: if the file is missing, is not IDX, or holds more or fewer bytes than its header says.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} must be an IDX file of unsigned bytes, got one that starts with {content[:4]!r}")
    dims = content[3]
    header = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:header]) if len(content) >= header else ()
    if len(content) != header + math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes of shape {shape}, got {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def write_idx(path: Path | str, array: np.ndarray) -> None:
    """Writes a uint8 array as gz-compressed IDX; the same array always gives the same bytes.

    Raises:
        ValueError: if the array is not uint8.
    """
    if array.dtype != np.uint8:
        raise ValueError(f"array must be uint8, got {array.dtype}")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, _UNSIGNED_BYTE, array.ndim, *array.shape)
    with replacing(path) as part:
        Path(part).write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))
