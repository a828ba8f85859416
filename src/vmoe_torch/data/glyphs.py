"""Characters as pictures: which of them a font file has, and how a face of it draws them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmoe_torch.data.names import shown
from vmoe_torch.data.scanning import is_hidden

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc", ".pfb")
# A code point that Unicode will never give a character: what a font draws for it is its sign for a missing glyph.
_NO_CHARACTER = "\uffff"
# Ink may be so wide and high, as a share of the picture's side; larger glyphs are drawn smaller.
_LARGEST_INK = 0.92
_EM = 0.8


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: Path
    """The font file."""
    index: int
    """Number of the face in its file; above 0 in collections only."""
    name: str
    """Family and style, as the file has them."""


def font_files(root: Path | str) -> list[Path]:
    """The font files anywhere below a folder that are not hidden, in the order of their paths.

    Raises:
        ValueError: if the folder is missing or holds no font file.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"folder of fonts {shown(root)} does not exist")
    files = sorted(_fonts(root))
    if not files:
        raise ValueError(f"folder of fonts {shown(root)} must hold font files ({', '.join(SUFFIXES)}), got none")
    return files


def has_fonts(root: Path | str) -> bool:
    """Whether there is a font file anywhere below a folder."""
    return any(_fonts(Path(root)))


def _fonts(root: Path) -> Iterator[Path]:
    return (
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(map(is_hidden, path.relative_to(root).parts)) and path.is_file()
    )


def faces_of(path: Path) -> Iterator[Face]:
    """The faces of a font file, of a collection all.

    Raises:
        ValueError: if the file is no font that FreeType can read.
    """
    index = 0
    while True:
        try:
            font = ImageFont.truetype(str(path), 16, index=index)
        except (OSError, ValueError) as error:
            if index == 0:
                raise ValueError(f"font {shown(path)} cannot be read: {error}") from None
            return
        yield Face(path, index, " ".join(part for part in font.getname() if part))
        index += 1
        if path.suffix.lower() not in (".ttc", ".otc"):
            return


def draw(face: Face, characters: Sequence[str], side: int) -> np.ndarray:
    """Draws characters, each in the middle of a square of its own.

    All are drawn at one size of the face, so that a small kana stays smaller than a kanji; what would not fit is drawn
    at a smaller size of its own. What the face has no glyph for is recognised by being drawn as the sign for missing
    glyphs, or by being drawn as nothing, and stays empty, as does a glyph that FreeType cannot draw.

    Args:
        face: the face.
        characters: N strings of one character each.
        side: height and width in pixels.

    Returns:
        (N, side, side) uint8, 0 is paper and 255 is ink.
    """
    font = ImageFont.truetype(str(face.path), max(round(side * _EM), 1), index=face.index)
    missing = _draw_one(font, _NO_CHARACTER, side)
    pictures = np.zeros((len(characters), side, side), np.uint8)
    for picture, character in zip(pictures, characters):
        drawn = _draw_one(font, character, side)
        if drawn.any() and not np.array_equal(drawn, missing):
            picture[:] = drawn
    return pictures


def _draw_one(font: ImageFont.FreeTypeFont, character: str, side: int) -> np.ndarray:
    image = Image.new("L", (side, side))
    largest = side * _LARGEST_INK
    try:
        ink = _ink(font, character)
        if max(ink.size) > largest:
            ink = _ink(font.font_variant(size=max(int(font.size * largest / max(ink.size)), 1)), character)
    except OSError:
        # A glyph whose program FreeType refuses; fonts have such ones beside thousands that are sound.
        return np.asarray(image)
    image.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(image)


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """What is drawn, without the paper around it."""
    # The box that a font tells is that of the line, not of the ink, and some glyphs reach out of it.
    left, top, right, bottom = font.getbbox(character)
    margin = font.size
    image = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin))
    ImageDraw.Draw(image).text((margin - left, margin - top), character, fill=255, font=font)
    return image.crop(image.getbbox() or (0, 0, 1, 1))
