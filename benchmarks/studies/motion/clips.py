"""The clips of the study in memory, by number: the same that `files` writes.

Dims: T frames of S x S pixels.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch.utils.data import Dataset

from benchmarks.studies.motion.draw import MOTIONS, moving_glyph
from vmoe_torch.data import Typefaces

# Of the glyphs that the clips are drawn from.
GLYPH_SIDE = 64
# matplotlib's own fonts, by the beginnings of their files' names: no family is in two splits.
FAMILIES = {
    "train": ("DejaVu",),
    "val": ("STIXGeneral",),
    "test": ("cmb10", "cmr10", "cmss10", "cmtt10", "cmti10", "cmmi10"),
}


class Clips(Dataset):
    """Every motion of every character in every face; an item is ((T, S, S) uint8, label).

    An item is drawn when it is asked for, and depends on its number alone. The two motions of a pair are each other's
    clips backwards.

    Args:
        fonts: folder with a folder of fonts per split.
        split: of the fonts.
        characters: one character each.
        clips: of every face, character and motion.
        frames: T.
        side: S.
        seed: of all that is drawn.
        cache: of the glyphs, as `Typefaces` has it.

    Attributes:
        class_names: "MOTION-CHARACTER" by label; motion m of character c has label m * characters + c.
    """

    def __init__(
        self,
        fonts: Path,
        split: str,
        characters: Sequence[str],
        *,
        clips: int = 1,
        frames: int = 16,
        side: int = 32,
        seed: int = 0,
        cache: Path | None = None,
    ):
        self.glyphs = Typefaces(fonts, split, characters, GLYPH_SIDE, cache=cache)
        self.split, self.clips, self.frames, self.side, self.seed = split, clips, frames, side, seed
        names = self.glyphs.class_names
        self.class_names = tuple(class_name(motion, name) for motion in MOTIONS for name in names)

    def __len__(self) -> int:
        return len(self.glyphs) * len(MOTIONS) * self.clips

    def place(self, index: int) -> tuple[int, int, int]:
        """Which glyph, which motion and which clip of them an item is."""
        glyph, rest = divmod(index, len(MOTIONS) * self.clips)
        return glyph, *divmod(rest, self.clips)

    def number(self, glyph: int, motion: int, clip: int = 0) -> int:
        """The number of such an item."""
        return (glyph * len(MOTIONS) + motion) * self.clips + clip

    def name(self, index: int) -> str:
        """FACE-CLIP, by which an item is told from the others of its class."""
        glyph, _, clip = self.place(index)
        return f"{self.glyphs.face_numbers[glyph]}-{clip}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        glyph, motion, clip = self.place(index)
        image, character = self.glyphs[glyph]
        names = self.glyphs.class_names
        # The same for both of a pair, which differ in nothing but their direction.
        face = int(self.glyphs.face_numbers[glyph])
        key = (self.seed, *self.split.encode(), face, ord(names[character]), motion // 2, clip)
        generator = np.random.default_rng(key)
        drawn = moving_glyph(np.asarray(image), MOTIONS[motion], generator, self.frames, self.side)
        return drawn, motion * len(names) + character


def class_name(motion: str, character: str) -> str:
    """What the folder of a class is called: "grow-A", or a number for what is no letter or digit."""
    return f"{motion}-{character if character.isalnum() else f'u{ord(character):04x}'}"


def link_fonts(folder: Path) -> Path:
    """Makes folder/{train,val,test} with links to matplotlib's fonts; returns the folder."""
    installed = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    for split, names in FAMILIES.items():
        place = folder / split
        place.mkdir(parents=True, exist_ok=True)
        for file in installed:
            if file.name.startswith(names) and not (place / file.name).exists():
                os.symlink(file, place / file.name)
    return folder
