"""Names of classes in figures: every letter has a glyph or is escaped, and a dollar is a dollar."""

import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from vmoe_torch.analyze import lettering
from vmoe_torch.analyze.lettering import Lettering

NAMES = ("coin $1_$5", r"a\$b$", "犬", "كلب", "a\nb", "b\udce9", "𒀀", "x" * 300, "$", "50%", "_")


def drawn(text, families):
    """Pixels of a text."""
    canvas = Figure(figsize=(4, 1))
    canvas.text(0, 0.3, text, fontfamily=families)
    agg = FigureCanvasAgg(canvas)
    agg.draw()
    return np.asarray(agg.buffer_rgba())


@pytest.fixture
def no_fallbacks(monkeypatch):
    """A machine with matplotlib's own fonts only."""
    monkeypatch.setattr(lettering, "fallback_families", lambda missing: [])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_drawn(name):
    letters = Lettering([name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(letters.text(name, 18), letters.families)
    text, font = letters.for_pillow(name, 14, 12)
    assert len(text) <= 14 * 10
    assert font.getlength(text) > 0


@pytest.mark.usefixtures("no_fallbacks")
def test_letters_without_a_glyph_are_escaped():
    letters = Lettering(["犬"])
    assert letters.text("犬 1", 18) == r"\u72ac 1"
    assert letters.for_pillow("犬", 18, 12)[0] == r"\u72ac"
    assert letters.text("Zoë", 18) == "Zoë"


def test_a_dollar_is_a_dollar():
    letters = Lettering(["$"])
    assert np.array_equal(drawn(letters.text("$", 9), letters.families), drawn("$", letters.families))
    one, two = (drawn(letters.text(name, 9), letters.families) for name in ("$a_b$", "ab"))
    assert (one < 255).any(-1).sum() > (two < 255).any(-1).sum()


def test_fonts_are_looked_for_only_where_letters_are_missing(monkeypatch):
    asked = []
    monkeypatch.setattr(lettering, "fallback_families", lambda missing: asked.append(missing) or [])
    Lettering(["cat", "Zoë", "$"])
    assert asked == []
    Lettering(["犬"])
    assert asked == [{"犬"}]


def test_fallbacks_have_the_letters():
    families = lettering.fallback_families(frozenset("犬"))
    if not families:
        pytest.skip("no font on this machine has the letter")
    assert ord("犬") in get_font(findfont(families[0])).get_charmap()
    assert lettering.fallback_families(frozenset("\U0010fffd")) == []
