"""Names as text that can be shown, and their order."""

import io
import itertools

import pytest

from vmoe_torch.cli import main
from vmoe_torch.data.names import natural_key, shown, some


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cat", "cat"),
        ("Zoë 犬", "Zoë 犬"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31m", r"\x1b[31m"),
        ("b\udce9.jpg", r"b\xe9.jpg"),
        ("\ud800", r"\ud800"),
        ("a\u202eb", r"a\u202eb"),
        ("\u2028", r"\u2028"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
    ],
)
def test_names_are_shown_on_one_line_that_can_be_encoded(name, text):
    assert shown(name) == text
    shown(name).encode()


def test_order_is_natural_and_total():
    names = ["dog10", "dog2", "Dog2", "1", "01", "a", "A", "²", "٣", "", "犬", "b\udce9"]
    want = sorted(names, key=natural_key)
    keys = [natural_key(name) for name in want]
    assert all(first < second for first, second in itertools.pairwise(keys))
    assert want.index("dog2") < want.index("dog10")
    assert want.index("01") + 1 == want.index("1")


def test_some_names_of_many():
    assert some(["a", "b\n"]) == r"a, b\n"
    assert some([str(number) for number in range(2000)]) == "0, 1, 2, 3, 4, 5 and 1,994 more"


def test_a_terminal_of_few_letters_ends_no_command(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", stream)
    assert main(["predict", "runs/犬", str(tmp_path / "犬\udce9.png")]) == 2
    stream.flush()
    assert rb"\u72ac" in stream.buffer.getvalue()
