"""Image files decoded to 8 bits: whatever Pillow reads, more bits scaled by their range, turned upright where asked."""

import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, features

from vmoe_torch.data.names import shown

# What Pillow raises for a file that is no image, or a part of one.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Formats that Pillow recognises but cannot decode without another program.
_STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Formats that a build of Pillow may lack.
_OPTIONAL = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}
# Formats whose grey images of more than 8 bits are given with 16.
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _ORIENTATION = 258, 339, 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(ValueError):
    """An image cannot be read; the message names it."""


@cache
def image_suffixes() -> frozenset[str]:
    """The endings, in small letters, of the files that this Pillow decodes by itself, as ".jpg"."""
    Image.init()
    lacking = {name for name, feature in _OPTIONAL.items() if not features.check(feature)}
    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _STUBS and name not in lacking
    )


def read_image(path: Path | str, mode: str = "RGB", exif: bool = False) -> Image.Image:
    """Reads and decodes an image file.

    Args:
        path: the file.
        mode: PIL mode to convert to, "RGB" or "L".
        exif: whether to turn the image as its EXIF orientation says.

    Raises:
        BrokenImageError: if the file is missing or cannot be decoded, naming it.
    """
    try:
        with Image.open(path) as image:
            return converted(image, mode, exif)
    except FileNotFoundError:
        raise BrokenImageError(f"image {shown(path)} does not exist") from None
    except UNREADABLE as error:
        raise broken(shown(path), error) from None


def broken(name: str, error: Exception) -> BrokenImageError:
    """The error for an image that cannot be read."""
    return BrokenImageError(f"image {name} cannot be read: {shown(error) or type(error).__name__}")


def converted(image: Image.Image, mode: str, exif: bool = False) -> Image.Image:
    """An image in 8 bits per channel.

    Grey images of more than 8 bits are scaled, where Pillow would cut them off: those of 16 bits (or of 12, in TIFF) by
    the range of their type; integers of 32 bits by the smallest of 255, 65535 and their own largest value that holds
    them, floating point numbers by that of 1, 255, 65535 and it, since images do not fill these types.

    Args:
        image: of any mode.
        mode: PIL mode to convert to, "RGB" or "L".
        exif: whether to turn it as its EXIF orientation says. Pillow always turns TIFF.
    """
    image.load()
    turn = _turn(image) if exif else None
    small = _in_eight_bits(image) if image.mode[0] in "IF" else image
    small = small if turn is None else small.transpose(turn)
    return small.convert(mode)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    # An image is not broken because its EXIF is.
    except UNREADABLE:
        return None


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of mode I;16 (of any byte order), I or F, in mode L."""
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", None) or {}
    known = 16 if image.mode != "I" or image.format in _SIXTEEN_BITS else 32
    bits = tags.get(_BITS_PER_SAMPLE, (known,))[0]
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        largest = _level(values, (1, 255, 65535))
    elif bits > 16:
        # Unsigned ones from 2^31 on come as negative.
        if tags.get(_SAMPLE_FORMAT, (2,))[0] == 1:
            values = values % 2**32
        largest = _level(values, (255, 65535))
    else:
        if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
            values = values + 2 ** (bits - 1)
        largest = 2**bits - 1
    return Image.fromarray((values.clip(0, largest) * (255 / largest)).round().astype(np.uint8))


def _level(values: np.ndarray, levels: tuple[int, ...]) -> float:
    """The smallest level that no value exceeds, else the largest value."""
    largest = float(values.max(initial=0))
    return next((level for level in levels if largest <= level), largest)
