"""Where the files of a tar file lie: ustar, GNU and pax headers, ten times faster than Python's tarfile."""

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from vmoe_torch.data.names import shown

BLOCK = 512
FILE, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = (b"0", b"\0", b"7"), b"L", b"K", (b"x", b"X"), b"g"
LINKS = (b"1", b"2")
# Links, devices, folders, pipes and the name of a volume have no content, whatever their header says of a size.
NO_CONTENT = (*LINKS, b"3", b"4", b"5", b"6", b"V")
_OCTAL = re.compile(rb"[0-7]*")
_PAX_LENGTH = re.compile(rb"(\d{1,20}) ([^=\n]+)=")


def tar_files(path: Path, links: bool = False) -> Iterator[tuple[str, int, memoryview | None]]:
    """(name, offset, content) of each regular file, in order; the content is valid until the next one.

    Args:
        path: of the tar file.
        links: whether to give links, too, with no content.

    Raises:
        ValueError: if it is not a whole tar file without compression, up to the mark at its end, or holds a sparse file
            or a part of one, naming it.
    """
    at, long_name, long_size = 0, None, None
    with open(path, "rb") as file:
        # An empty file cannot be mapped.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else nullcontext(b"")
    with data as data:
        while True:
            header = data[at : at + BLOCK]
            if len(header) == BLOCK and not any(header):
                return
            if not _is_header(header):
                raise ValueError(
                    f"{shown(path)} must be a whole tar file without compression, got no header at byte {at}"
                )
            size, kind, first = read_number(header[124:136]), header[156:157], at + BLOCK
            if kind == LONG_NAME:
                long_name = data[first : first + size].partition(b"\0")[0]
            elif kind in PAX:
                records = _pax_records(data[first : first + size])
                long_name = records.get(b"path", long_name)
                if b"size" in records:
                    long_size = _decimal(records[b"size"], path, at)
                if any(key.startswith(b"GNU.sparse.") for key in records):
                    kind, long_name = b"S", records.get(b"GNU.sparse.name", long_name)
            elif kind not in (LONG_LINK, PAX_GLOBAL, b"S"):
                name = (long_name or _name(header)).decode(errors="surrogateescape")
                size = size if long_size is None else long_size
                # As tar wrote folders before it had a kind for them.
                folder = kind == b"\0" and name.endswith("/")
                if kind in NO_CONTENT or folder:
                    size = 0
                    if links and kind in LINKS:
                        yield name, first, None
                elif kind in FILE:
                    if first + size > len(data):
                        raise ValueError(
                            f"{shown(path)} must be a whole tar file without compression, got {len(data)} bytes and "
                            f"{shown(name)} up to byte {first + size}"
                        )
                    with memoryview(data) as view, view[first : first + size] as content:
                        yield name, first, content
                else:
                    raise ValueError(f"{shown(name)} in {shown(path)} must be a plain file, got kind {kind!r}")
                long_name = long_size = None
            if kind == b"S":
                name = shown((long_name or _name(header)).decode(errors="surrogateescape"))
                raise ValueError(f"{name} in {shown(path)} must be a plain file, got a sparse one")
            at = first + -(-size // BLOCK) * BLOCK


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """{key: value}; each begins with its length, as values may hold line breaks."""
    records, at = {}, 0
    while found := _PAX_LENGTH.match(content, at):
        end = at + int(found[1])
        if not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            break
        records[found[2]] = content[found.end() : end - 1]
        at = end
    return records


def _decimal(value: bytes, path: Path, at: int) -> int:
    if not re.fullmatch(rb"\d{1,19}", value):
        raise ValueError(f"size in the header at byte {at} of {shown(path)} must be a number, got {value[:20]!r}")
    return int(value)


def _is_header(header: bytes) -> bool:
    """Whether it is whole, its size is a number, and its checksum, which counts itself as spaces, is right."""
    if len(header) < BLOCK or read_number(header[124:136]) is None:
        return False
    return sum(header) - sum(header[148:156]) + 8 * ord(" ") == read_number(header[148:156])


def read_number(field: bytes) -> int | None:
    """Octal digits, or GNU's binary for sizes from 8 GiB; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU's magic has a space there, and no prefix.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
