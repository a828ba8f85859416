"""Names of classes in figures: in fonts that have their letters, escaped where none has, never taken for formulas."""

from collections.abc import Iterable
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import ImageFont

from vmoe_torch.data.names import shown
from vmoe_torch.report.style import shorten


class Lettering:
    """The fonts that it takes to write some names.

    Args:
        names: as the user has them.

    Attributes:
        families: of fonts, the usual first, as matplotlib takes them for its texts.
    """

    def __init__(self, names: Iterable[str]):
        usual = FontProperties().get_family()
        self.families = list(usual)
        missing = {char for name in names for char in shown(name)} - _letters(tuple(usual))
        if missing:
            self.families += fallback_families(frozenset(missing))

    def text(self, name: str, length: int) -> str:
        """A name for matplotlib, of so many characters at most."""
        # An escaped dollar stands for itself; two others would enclose a formula.
        return self._plain(name, length).replace("$", r"\$")

    def for_pillow(self, name: str, length: int, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
        """A name, and a font that has most of its letters, for Pillow, which takes one at a time."""
        text = self._plain(name, length)
        # The first of those that have as many.
        family = max(self.families, key=lambda family: len(set(text) & _letters((family,))))
        letters = _letters((family,))
        path = _file(family)
        # Newer versions of matplotlib say which font of a collection it is.
        font = ImageFont.truetype(str(path), size, index=getattr(path, "face_index", 0))
        return "".join(char if char in letters else _escaped(char) for char in text), font

    def _plain(self, name: str, length: int) -> str:
        letters = _letters(tuple(self.families))
        return shorten("".join(char if char in letters else _escaped(char) for char in shown(name)), length)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _file(family: str) -> str:
    return findfont(FontProperties(family=[family]))


@cache
def _letters(families: tuple[str, ...]) -> frozenset[str]:
    """All letters that fonts of these families have."""
    return frozenset(chr(code) for family in families for code in get_font(_file(family)).get_charmap())


@cache
def fallback_families(missing: frozenset[str]) -> list[str]:
    """Families that have most of these letters, as few as it takes; reads every font of the machine."""
    found: dict[str, frozenset[str]] = {}
    plain = {font.name for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)}
    for family in sorted(name for name in plain if "last resort" not in name.lower()):
        try:
            font = get_font(findfont(FontProperties(family=[family]), fallback_to_default=False))
            # Pictures in colour, which matplotlib cannot draw.
            if font.scalable and (letters := missing.intersection(map(chr, font.get_charmap()))):
                found[family] = letters
        # Fonts are whatever lies in the system's folders.
        except (OSError, RuntimeError, ValueError):
            continue
    chosen, left = [], missing
    while found:
        # Sans serif as the rest of the figure, where there is a choice.
        best = max(found, key=lambda family: (len(found[family] & left), "sans" in family.lower(), family))
        if not found[best] & left:
            break
        chosen.append(best)
        left = left - found.pop(best)
    return chosen
