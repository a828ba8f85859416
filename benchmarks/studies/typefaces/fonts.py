"""Which typefaces are trained on, which choose the settings and which test; and which characters are learned.

Fonts come from Debian's packages (`PACKAGES`). Families are whole: a typeface to test on shares no design with one
that was trained on, and so do those to validate on, which choose every setting.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError

from vmoe_torch.data.glyphs import font_files
from vmoe_torch.data.typefaces import CHARACTERS

INSTALLED = Path("/usr/share/fonts")
# fmt: off
PACKAGES = (
    "fonts-aoyagi-kouzan-t", "fonts-aoyagi-soseki", "fonts-arphic-ukai", "fonts-arphic-uming",
    "fonts-babelstone-han", "fonts-cns11643-kai", "fonts-cns11643-sung", "fonts-dejima-mincho", "fonts-hanazono",
    "fonts-horai-umefont", "fonts-ipaexfont-gothic", "fonts-ipaexfont-mincho", "fonts-ipafont-gothic",
    "fonts-ipafont-mincho", "fonts-ipamj-mincho", "fonts-kanjistrokeorders", "fonts-kiloji", "fonts-konatu",
    "fonts-kouzan-mouhitsu", "fonts-lxgw-wenkai", "fonts-migmix", "fonts-misaki", "fonts-mona", "fonts-monapo",
    "fonts-motoya-l-cedar", "fonts-motoya-l-maruberi", "fonts-noto-cjk", "fonts-oradano-mincho-gsrr", "fonts-reggae",
    "fonts-sawarabi-gothic", "fonts-sawarabi-mincho", "fonts-seto", "fonts-takao-gothic", "fonts-takao-mincho",
    "fonts-umeplus", "fonts-umeplus-cl", "fonts-vlgothic", "fonts-wqy-microhei", "fonts-wqy-zenhei",
    "fonts-yozvox-yozfont",
)
# fmt: on
# A typeface takes part if it has this many of the kanji.
LEAST = 2700
# Beginnings of file names. Handwriting: setofont, kiloji, LXGW WenKai. Display: Reggae One. A Mincho, and a Gothic.
TEST = ("setofont.", "kiloji.", "LXGWWenKai-Regular.", "ReggaeOne-", "dejima-mincho", "MTLc3m.")
VALIDATION = (
    "Konatu.",
    "sawarabi-mincho",
    "aoyagi-soseki",
    "wqy-zenhei",
    "YOzRC_.",
    "MTLmr3m.",
    "TW-Kai",
    "OradanoGSRR",
)
# Families of those: never trained on, whatever the file.
FAMILIES = ("seto", "kiloji", "LXGW", "Reggae", "dejima", "MTL", "Konatu", "sawarabi-mincho", "aoyagi-soseki")
FAMILIES += ("wqy-zenhei", "YOz", "TW-Kai", "OradanoGSRR")
# Learned: the 2,965 kanji of level 1 of JIS X 0208. For few-shot transfer: characters that nobody was trained on.
LEVEL_1, LEVEL_2 = (16, 48), (48, 85)
HIRAGANA, KATAKANA, GREEK, CYRILLIC, HANGUL = (
    (0x3041, 0x3094),
    (0x30A1, 0x30F7),
    (0x391, 0x3CA),
    (0x410, 0x450),
    (0xAC00, 0xD7A4),
)


def kanji(rows: tuple[int, int]) -> list[str]:
    """Characters of some rows of JIS X 0208, in their order."""
    found = []
    for row in range(*rows):
        for cell in range(1, 95):
            try:
                found.append(bytes([0xA0 + row, 0xA0 + cell]).decode("euc_jp"))
            except UnicodeDecodeError:
                continue
    return found


def scripts() -> dict[str, list[str]]:
    """Few-shot tasks by name: characters that no model was trained on."""

    def between(first: int, end: int, step: int = 1) -> list[str]:
        return [chr(code) for code in range(first, end, step) if chr(code).isprintable()]

    return {
        # Every seventh: enough classes, in a minute.
        "kanji of level 2": kanji(LEVEL_2)[::7],
        "kana": between(*HIRAGANA) + between(*KATAKANA),
        "Greek and Cyrillic": between(*GREEK) + between(*CYRILLIC),
        "Hangul": between(*HANGUL, 37),
    }


def prepare(folder: Path, installed: Path = INSTALLED) -> Path:
    """Makes folder/{train,val,test} with links to the installed fonts, and characters.txt; returns the folder.

    Raises:
        ValueError: if a split has no typeface: the message names the packages.
    """
    wanted = kanji(LEVEL_1)
    splits = split(covering(font_files(installed), wanted))
    for name, files in splits.items():
        if not files:
            raise ValueError(f"{installed} must hold fonts for {name}, got none: apt-get install {' '.join(PACKAGES)}")
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        for file in files:
            os.symlink(file, place / file.name)
    (folder / CHARACTERS).write_text("".join(wanted), encoding="utf-8")
    return folder


def covering(files: Iterable[Path], characters: Iterable[str], least: int = LEAST) -> list[Path]:
    """The files whose first face has at least so many of the characters; links to files are passed over."""
    wanted, found = {ord(character) for character in characters}, []
    for file in files:
        if file.is_symlink():
            continue
        try:
            with TTFont(file, fontNumber=0, lazy=True) as font:
                has = len(wanted & set(font.getBestCmap() or ()))
        except (TTLibError, KeyError, AssertionError):
            continue
        if has >= least:
            found.append(file)
    return found


def split(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by "train", "val" and "test"; what shares a family with val or test and is in neither is left out."""
    parts: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for file in sorted(files, key=lambda file: file.name):
        if file.name.startswith(TEST):
            parts["test"].append(file)
        elif file.name.startswith(VALIDATION):
            parts["val"].append(file)
        elif not file.name.startswith(FAMILIES):
            parts["train"].append(file)
    return parts
