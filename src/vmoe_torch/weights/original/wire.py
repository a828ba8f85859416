"""The part of msgpack that the original's checkpoints use: a pull parser that trusts nothing, and a packer.

A generic decoder builds whatever a file declares. This one is asked for one thing at a time, so a damaged file fails at
its first wrong byte, and nothing is ever allocated because a header says so.
"""

import struct
from collections.abc import Callable

# What a header's first byte says: kind, and how many bytes of big-endian number follow.
_SIZED = {
    0xC4: ("bin", "B"),
    0xC5: ("bin", "H"),
    0xC6: ("bin", "I"),
    0xC7: ("ext", "B"),
    0xC8: ("ext", "H"),
    0xC9: ("ext", "I"),
    0xCC: ("int", "B"),
    0xCD: ("int", "H"),
    0xCE: ("int", "I"),
    0xCF: ("int", "Q"),
    0xD0: ("int", "b"),
    0xD1: ("int", "h"),
    0xD2: ("int", "i"),
    0xD3: ("int", "q"),
    0xD9: ("str", "B"),
    0xDA: ("str", "H"),
    0xDB: ("str", "I"),
    0xDC: ("array", "H"),
    0xDD: ("array", "I"),
    0xDE: ("map", "H"),
    0xDF: ("map", "I"),
}
_PLAIN = {0xC0: ("nil", None), 0xC2: ("bool", False), 0xC3: ("bool", True)}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or not what it says; the message names the file and the leaf."""


class Window:
    """Reads of a few bytes each, served from a larger one.

    Args:
        read: read(offset, size) -> bytes, fewer at the end of the file.
        size: bytes of the file.
        name: of the file, for errors.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, name: str, span: int = 1 << 16):
        self.read, self.size, self.name, self.span = read, size, name, span
        self._bytes, self._begin = b"", 0

    @classmethod
    def of(cls, data: bytes, name: str) -> "Window":
        """A window onto bytes in memory."""
        return cls(lambda offset, size: data[offset : offset + size], len(data), name, span=0)

    def take(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes."""
        begin = offset - self._begin
        if begin < 0 or begin + size > len(self._bytes):
            self._bytes, self._begin, begin = self.read(offset, max(size, self.span)), offset, 0
            if len(self._bytes) < size:
                raise CheckpointError(f"{self.name} ends at byte {offset + len(self._bytes)}, within a value")
        return self._bytes[begin : begin + size]


class Cursor:
    """Walks the msgpack values in a range of a file.

    Every method but `skip` reads one value, says in its error what it wanted, and raises CheckpointError.
    """

    def __init__(self, window: Window, begin: int = 0, end: int | None = None):
        self.window = window
        self.position = begin
        self.end = window.size if end is None else end
        self.about = ""

    def fail(self, rule: str, got) -> CheckpointError:
        """The error to raise: which file, which leaf, the rule, what was there."""
        about = f" leaf {self.about!r}:" if self.about else ""
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return CheckpointError(f"{self.window.name}:{about} {rule}, got {shown} before byte {self.position}")

    def inside(self, begin: int, size: int) -> "Cursor":
        """A cursor over a part of the file, with the same leaf in its errors."""
        cursor = Cursor(self.window, begin, begin + size)
        cursor.about = self.about
        return cursor

    def skip(self, size: int) -> int:
        """Steps over bytes that are certain to be there; returns where they begin."""
        begin = self.position
        if size > self.end - begin:
            raise self.fail("the file must hold what its headers say", f"{size} bytes of {self.end - begin} left")
        self.position += size
        return begin

    def _take(self, size: int) -> bytes:
        return self.window.take(self.skip(size), size)

    def header(self) -> tuple[str, object]:
        """The next value's kind, and its value, length, number of elements, or (ext type, length)."""
        first = self._take(1)[0]
        if first in _PLAIN:
            return _PLAIN[first]
        if first in _SIZED:
            kind, code = _SIZED[first]
            value = struct.unpack(">" + code, self._take(struct.calcsize(code)))[0]
            return kind, (struct.unpack("b", self._take(1))[0], value) if kind == "ext" else value
        if first in _FIXED_EXT:
            return "ext", (struct.unpack("b", self._take(1))[0], _FIXED_EXT[first])
        if first < 0x80:
            return "int", first
        if first >= 0xE0:
            return "int", first - 0x100
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "array", first & 0x0F
        if first < 0xC0:
            return "str", first & 0x1F
        raise self.fail("values must be of the types that the format has", f"type byte {first:#x}")

    def _expect(self, kind: str, what: str):
        found, value = self.header()
        if found != kind:
            raise self.fail(f"{what} must be of type {kind}", found)
        return value

    def count(self, kind: str, what: str, exactly: int | None = None) -> int:
        """Number of elements of the array, or pairs of the map, that begins here."""
        count = self._expect(kind, what)
        if exactly is not None and count != exactly:
            raise self.fail(f"{what} must have {exactly} elements", count)
        # An element takes at least one byte, a pair two.
        if count * (2 if kind == "map" else 1) > self.end - self.position:
            raise self.fail(f"{what} must fit the file", f"{count} elements in {self.end - self.position} bytes")
        return count

    def integer(self, what: str) -> int:
        """An integer."""
        return self._expect("int", what)

    def boolean(self, what: str) -> bool:
        """True or false."""
        return self._expect("bool", what)

    def text(self, what: str, most: int = 256) -> str:
        """A UTF-8 string of at most so many bytes."""
        size = self._expect("str", what)
        if size > most:
            raise self.fail(f"{what} must be at most {most} bytes long", size)
        raw = self._take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} must be UTF-8", raw) from None

    def blob(self, what: str) -> tuple[int, int]:
        """Steps over binary data; returns where it begins and its size."""
        size = self._expect("bin", what)
        return self.skip(size), size

    def extension(self, code: int, what: str) -> "Cursor":
        """Steps over extension data of this type; returns a cursor over it."""
        found, size = self._expect("ext", what)
        if found != code:
            raise self.fail(f"{what} must be extension type {code}", found)
        return self.inside(self.skip(size), size)

    def done(self, what: str) -> None:
        """Nothing is left."""
        if self.position != self.end:
            raise self.fail(f"{what} must end here", f"{self.end - self.position} more bytes")


def pack(value) -> bytes:
    """Packs None, bools, ints, strings, bytes, lists, tuples and dicts, each in its shortest form."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _pack_integer(value)
    if isinstance(value, str):
        raw = value.encode()
        return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else _sized((0xD9, 0xDA, 0xDB), len(raw))) + raw
    if isinstance(value, bytes):
        return _sized((0xC4, 0xC5, 0xC6), len(value)) + value
    if isinstance(value, dict):
        return map_header(len(value)) + b"".join(pack(item) for pair in value.items() for item in pair)
    return array_header(len(value)) + b"".join(map(pack, value))


def array_header(count: int) -> bytes:
    """What begins an array."""
    return bytes([0x90 | count]) if count < 16 else _sized((None, 0xDC, 0xDD), count)


def map_header(count: int) -> bytes:
    """What begins a map."""
    return bytes([0x80 | count]) if count < 16 else _sized((None, 0xDE, 0xDF), count)


def extension_header(code: int, size: int) -> bytes:
    """What begins extension data."""
    fixed = {length: first for first, length in _FIXED_EXT.items()}.get(size)
    return (bytes([fixed]) if fixed else _sized((0xC7, 0xC8, 0xC9), size)) + struct.pack("b", code)


def blob_header(size: int) -> bytes:
    """What begins binary data."""
    return _sized((0xC4, 0xC5, 0xC6), size)


def _sized(firsts: tuple[int | None, int, int], size: int) -> bytes:
    for first, code, above in zip(firsts, "BHI", (1 << 8, 1 << 16, 1 << 32)):
        if first is not None and size < above:
            return struct.pack(">B" + code, first, size)
    raise ValueError(f"a value must be below 4 GiB to be packed, got {size}")


def _pack_integer(value: int) -> bytes:
    if -32 <= value < 128:
        return struct.pack("b" if value < 0 else "B", value)
    choices = ((0xCC, "B"), (0xCD, "H"), (0xCE, "I"), (0xCF, "Q"))
    if value < 0:
        choices = ((0xD0, "b"), (0xD1, "h"), (0xD2, "i"), (0xD3, "q"))
    for first, code in choices:
        bits = 8 * struct.calcsize(code)
        if -(1 << bits - 1) <= value < 1 << bits:
            return struct.pack(">B" + code, first, value)
    raise ValueError(f"an integer must fit 64 bits to be packed, got {value}")
