"""Names that users give to files and classes: shown so that no terminal, table or page stumbles, and put in order."""

import re

# Joiners that Persian and Indic words need, though they are not printed.
_JOINERS = "\u200c\u200d"
_DIGITS = re.compile(r"(\d+)")


def shown(name: object) -> str:
    r"""A name as text of one line that every encoding of Unicode can hold.

    Line breaks, escape sequences, marks that turn the direction of writing, and bytes of file names that are no text
    are written as in Python: "\n", "\x1b", "\u202e", "\xe9".
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in _JOINERS else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    # How Python spells the bytes of a file name that it cannot decode.
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def natural_key(name: str) -> tuple:
    """Orders as timm does, "dog2" before "dog10" and whatever the case; names that are alike so follow their letters,
    so the order is total: "A" before "a", "01" before "1"."""
    # Every second part is of digits.
    parts = _DIGITS.split(name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def some(names: list[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + rest
