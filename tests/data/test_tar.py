"""Tar files: what the reader finds, against Python's tarfile."""

import io
import tarfile

import pytest

from vmoe_torch.data.tar import read_number, tar_files


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
    assert read_number(field) == number


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name", ["a\nb.jpg", "x" * 99, "x" * 100, "d" * 90 + "/" + "x" * 90, "b\udce9.jpg", "12 path=c.jpg"]
)
def test_names_are_those_of_tarfile(tmp_path, form, name):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form, encoding="utf-8") as tar:
        member = tarfile.TarInfo(name)
        member.size = 3
        if form == tarfile.PAX_FORMAT:
            # Looks like a record, and is a part of one.
            member.pax_headers = {"comment": "one\n12 path=evil\n"}
        tar.addfile(member, io.BytesIO(b"abc"))
    with tarfile.open(path, encoding="utf-8") as tar:
        (expected,) = [(m.name, m.offset_data) for m in tar]
    ((got, offset, content),) = [(name, offset, bytes(content)) for name, offset, content in tar_files(path)]
    assert offset == expected[1]
    assert content == b"abc"
    assert got.encode(errors="surrogateescape") == expected[0].encode(errors="surrogateescape")


def set_size(content, begin, size):
    """Another size in the header that begins there, and the checksum for it."""
    content[begin + 124 : begin + 136] = f"{size:011o}\0".encode()
    header = content[begin : begin + 512]
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    content[begin + 148 : begin + 156] = f"{total:06o}\0 ".encode()


def test_size_of_a_pax_record_counts(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 600
            member.pax_headers = {"size": "600"}
            tar.addfile(member, io.BytesIO(name.encode() * 600))
    content = bytearray(path.read_bytes())
    # The third block is the first file's header: its size as writers leave it that trust the record.
    set_size(content, 1024, 0)
    path.write_bytes(content)
    assert [(name, len(data)) for name, _, data in tar_files(path)] == [("a", 600), ("b", 600)]


def test_links_and_folders_have_no_content_whatever_their_size(tmp_path):
    path, headers = tmp_path / "a.tar", []
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("l" * 150, tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE), ("old/", tarfile.AREGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "t" * 150 if kind == tarfile.SYMTYPE else ""
            tar.addfile(member)
            # The header of the member itself is the last one; some writers leave the length of a link's target in it.
            headers.append(tar.offset - 512)
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    content = bytearray(path.read_bytes())
    for begin in headers:
        set_size(content, begin, 1100)
    path.write_bytes(content)
    assert [(name, bytes(content)) for name, _, content in tar_files(path)] == [("a.jpg", b"abc")]
    assert [name for name, _, content in tar_files(path, links=True) if content is None] == ["l" * 150]


def test_a_part_of_a_file_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 2000
        tar.addfile(member, io.BytesIO(bytes(2000)))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"must be a whole tar file .*, got 1500 bytes and a\.jpg up to byte 2512"):
        list(tar_files(path))
