"""Tar files: what the reader finds, against Python's tarfile."""

import io
import tarfile

import pytest

from vmoe_torch.data.tar import _number, tar_files


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_are_those_of_tarfile(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(("a.jpg", "b/é.png", f"{'c' * 90}/{'d' * 60}.jpg", "e" * 100, "folder/", "link")):
            member = tarfile.TarInfo(name.rstrip("/"))
            member.size = 0 if name in ("folder/", "link") else (0, 1, 511, 512)[number]
            member.type = {"folder/": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}.get(name, tarfile.REGTYPE)
            member.linkname = "a.jpg" if name == "link" else ""
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "one\nline more"}
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, tar.extractfile(m).read()) for m in tar if m.isfile()]
    assert len(expected) == 4
    assert [(name, offset, bytes(content)) for name, offset, content in tar_files(path)] == expected


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (bytes(tarfile.itn(2**40, 12, tarfile.GNU_FORMAT)), 2**40),
        (b"00000001000\0", 512),
        (b"      1000 \0", 512),
        (b"\0" * 12, 0),
        # A size below zero would lead back to the same header for ever.
        (b"-0000001000\0", None),
        (b"0000000100x\0", None),
    ],
)
def test_sizes(field, number):
    assert _number(field) == number
