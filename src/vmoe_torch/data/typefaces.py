"""Characters in typefaces: any fonts, any characters; the task is to read a character in a typeface never seen.

A folder holds one folder of font files per split, and beside them, if not all that the training fonts have in common is
meant, `characters.txt` with the characters to tell apart:

    FONTS/characters.txt
    FONTS/train/*.ttf, *.otf, *.ttc ...
    FONTS/val/...

Fonts are drawn once, into files of the cache. That fits rare scripts, for which there are fonts but no photographs.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from vmoe_torch.data.glyphs import Face, draw, faces_of, font_files
from vmoe_torch.data.names import shown, some

TYPEFACES = "typefaces"
LEAST_SIDE = 8
CHARACTERS = "characters.txt"
# Of the drawing: a cache of another version is drawn anew.
_VERSION = 1


class Typefaces(Dataset):
    """Drawn characters; an item is (PIL image, label), ink white on black, ordered by face and then by character.

    Args:
        root: folder with a folder of font files per split.
        split: name of the split's folder.
        characters: the classes, a string or strings of one character each; None takes those of characters.txt, and
            without it all that every face of the split has.
        side: height and width of the pictures in pixels.
        mode: PIL mode of the items, "L" or "RGB".
        cache: folder of the drawn pictures; None is vmoe_torch/typefaces in the user's cache folder.

    Attributes:
        root: folder of the split.
        class_names: the characters, by label.
        faces: the faces that have at least one of them, without those that draw all as an earlier one does.
        labels: (N,) int64.
        face_numbers: (N,) int64 place of each item's face in `faces`.
        empty: characters that no face has.
        notices: what was passed over.

    Raises:
        ValueError: if a folder is missing or holds no font, a font cannot be read, a character is named twice, or no
            font has any of them.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "train",
        characters: Sequence[str] | None = None,
        side: int = 48,
        mode: str = "L",
        cache: Path | str | None = None,
    ):
        if isinstance(side, bool) or not isinstance(side, int) or side < LEAST_SIDE:
            raise ValueError(f"side must be at least {LEAST_SIDE} pixels, got {side!r}")
        self.root = Path(root) / split
        files = font_files(self.root)
        listed = Path(root) / CHARACTERS
        if characters is not None:
            characters = checked_characters(characters)
        elif listed.is_file():
            characters = checked_characters(_read_characters(listed), f"characters of {shown(listed)}")
        else:
            characters = checked_characters(_in_common(files), f"characters that all fonts in {shown(self.root)} have")
        cache = _cache_folder() if cache is None else Path(cache)
        self.class_names = characters
        self.mode = mode
        self.faces: list[Face] = []
        self._pictures: list[np.ndarray] = []
        self._keys: list[str] = []
        labels, numbers, known = [], [], set()
        without = repeated = 0
        for path in _watched(files, split):
            for face, key, pictures in _drawn(path, characters, side, cache):
                there = np.flatnonzero(pictures.any(axis=(1, 2)))
                # A proportional and a monospaced face differ in nothing here, as often those of one collection.
                digest = hashlib.sha256(pictures).digest()
                if len(there) == 0 or digest in known:
                    without, repeated = without + (len(there) == 0), repeated + (len(there) > 0)
                    continue
                known.add(digest)
                labels.append(there)
                numbers.append(np.full(len(there), len(self.faces)))
                self.faces.append(face)
                self._pictures.append(pictures)
                self._keys.append(key)
        if not self.faces:
            raise ValueError(f"fonts in {shown(self.root)} must have some of the characters, got none that has any")
        self.labels = np.concatenate(labels).astype(np.int64)
        self.face_numbers = np.concatenate(numbers).astype(np.int64)
        self.empty = [characters[label] for label in sorted(set(range(len(characters))) - set(self.labels.tolist()))]
        counts = ((without, "have none of the characters"), (repeated, "draw all as an earlier one does"))
        self.notices = [f"passed over {count:,} faces that {what}" for count, what in counts if count]
        if self.empty:
            of = f"{len(self.empty):,} of {len(characters):,} characters"
            self.notices.append(f"no face has {of}: {some(self.empty)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = int(self.labels[index])
        image = Image.fromarray(np.asarray(self._pictures[self.face_numbers[index]][label]))
        return (image if self.mode == "L" else image.convert(self.mode)), label

    def __getstate__(self) -> dict[str, Any]:
        """Pictures on the disk travel to other processes as the names of their files."""
        pictures = [Path(p.filename) if isinstance(p, np.memmap) else p for p in self._pictures]
        return {**vars(self), "_pictures": pictures}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pictures = [np.load(p, mmap_mode="r") if isinstance(p, Path) else p for p in self._pictures]

    def digest(self) -> str:
        """Of the fonts that are drawn, of the size, and of their labels and classes."""
        digest = hashlib.sha256("\0".join([*self.class_names, *self._keys]).encode(errors="surrogateescape"))
        digest.update(self.face_numbers.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def are_characters(names: Sequence[str]) -> bool:
    """Whether names of classes are characters to draw."""
    return all(isinstance(name, str) and len(name) == 1 and not name.isspace() for name in names)


def checked_characters(characters: Sequence[str], name: str = "characters") -> tuple[str, ...]:
    """The characters, one by one.

    Raises:
        ValueError: naming what they are, if there is none, one is no character, or one is there twice.
    """
    characters = tuple(characters)
    if not are_characters(characters):
        wrong = next(c for c in characters if not are_characters([c]))
        raise ValueError(f"{name} must be single characters that draw something, got {wrong!r}")
    if len(set(characters)) < len(characters):
        twice = Counter(characters).most_common(1)[0][0]
        raise ValueError(f"{name} must be named once each, got {twice!r} twice")
    if not characters:
        raise ValueError(f"{name} must be at least one, got none")
    return characters


def _watched(files: list[Path], split: str) -> Iterable[Path]:
    """With a bar, where it takes time."""
    return tqdm(
        files,
        desc=f"drawing the fonts of {shown(split)}",
        unit=" fonts",
        delay=2.0,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        leave=False,
        # The other processes of a run draw the same.
        disable=os.environ.get("RANK", "0") != "0",
    )


def _read_characters(path: Path) -> tuple[str, ...]:
    """The characters of a text file in its order; white space separates nothing and means nothing."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown(path)} must be a text file in UTF-8: {error}") from None
    return tuple(c for c in text if not c.isspace())


def _in_common(files: list[Path]) -> tuple[str, ...]:
    """The characters that every face of every file has, by code point; those without a form of their own left out."""
    # Comes with matplotlib, which the training needs anyway.
    from fontTools.ttLib import TTFont, TTLibError

    common: set[int] | None = None
    for path in files:
        for face in faces_of(path):
            try:
                with TTFont(path, fontNumber=face.index, lazy=True) as font:
                    found = set(font.getBestCmap() or ())
            except (TTLibError, KeyError, AssertionError) as error:
                raise ValueError(
                    f"font {shown(path)} does not say which characters it has ({error}): list them in {CHARACTERS}"
                ) from None
            common = found if common is None else common & found
    return tuple(chr(code) for code in sorted(common or ()) if chr(code).isprintable() and not chr(code).isspace())


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vmoe_torch" / "typefaces"


def _drawn(path: Path, characters: tuple[str, ...], side: int, cache: Path) -> list[tuple[Face, str, np.ndarray]]:
    """Each face of a file, with the name of its drawing and its (N, side, side) pictures, from the cache or into it.

    The name tells the font's bytes, the characters and the size.
    """
    faces = list(faces_of(path))
    wanted = json.dumps([_VERSION, side, "".join(characters)]).encode()
    key = hashlib.sha256(wanted + path.read_bytes()).hexdigest()[:32]
    drawn = []
    for face in faces:
        name = f"{key}-{face.index}"
        file = cache / f"{name}.npy"
        pictures = _read(file, (len(characters), side, side))
        if pictures is None:
            pictures = draw(face, characters, side)
            _write(file, pictures)
            # From the disk: all fonts together may be more than the memory, and processes share it so.
            written = _read(file, pictures.shape)
            pictures = pictures if written is None else written
        drawn.append((face, name, pictures))
    return drawn


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The pictures of a file, left on the disk; None where it is missing or damaged."""
    try:
        pictures = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return pictures if pictures.shape == shape and pictures.dtype == np.uint8 else None


def _write(file: Path, pictures: np.ndarray) -> None:
    """Whole or not at all; where there is no room for a cache, the pictures stay in memory."""
    partial = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as opened:
                np.save(opened, pictures)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
