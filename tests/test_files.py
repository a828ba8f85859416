"""Files that are there whole or not at all."""

import ast
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmoe_torch import files


def test_an_error_changes_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")

    def interrupted():
        with files.replacing(path) as part:
            Path(part).write_text("aft")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    with pytest.raises(OSError, match=r"table .*none/x cannot be written: No such file or directory; \d+ MiB are free"):
        files.write_text("table", tmp_path / "none" / "x", "after")
    files.write_text("table", path, "after \ud800\r\n")
    assert path.read_bytes() == b"after \\ud800\r\n"
    assert list(tmp_path.iterdir()) == [path]


def test_windows_syncs_no_folders_and_what_may_be_written(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    opened, synced = os.open, []

    def windows_open(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)

    def windows_fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(descriptor)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    files.write_text("table", tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"
    assert len(synced) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")
def test_what_is_no_file_is_written_itself(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    files.write_json("table", pipe, [1])
    reader.join(60)
    assert read == ["[\n 1\n]\n"]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not os.path.islink("/dev/stdout"), reason="this system has no /dev/stdout")
def test_stdout_that_leads_to_a_file_stays_what_it_is(tmp_path):
    printed = tmp_path / "printed"
    code = "from vmoe_torch import files; files.write_text('table', '/dev/stdout', 'text')"
    with open(printed, "a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=300)
    assert printed.read_text() == "text"
    assert os.path.islink("/dev/stdout")
    assert list(tmp_path.iterdir()) == [printed]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    real.write_text("before")
    link.symlink_to(real)
    files.write_text("table", link, "after")
    assert link.is_symlink()
    assert real.read_text() == "after"
    assert list((tmp_path / "folder").iterdir()) == [real]


def test_csv_has_the_columns_that_were_named():
    rows = [{"a": 1, "b": None, "c": 3}, {"a": "x,y", "b": 2.5, "c": 4}]
    assert files.csv_text(rows, ("a", "b")) == 'a,b\r\n1,\r\n"x,y",2.5\r\n'


def _written(call: ast.Call) -> str | None:
    """What a call writes, as the code names it; None if it writes no file."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("write_text", "write_bytes"):
        return ast.unparse(call.func.value)
    if isinstance(call.func, ast.Name) and call.func.id == "open" and len(call.args) > 1:
        return ast.unparse(call.args[0]) if "w" in ast.unparse(call.args[1]) else None
    return None


def test_only_parts_are_written_in_their_place():
    """Those take the place of the whole afterwards."""
    parts = {"part", "Path(part)", "partial", "partial / COMPLETE", "partial / STATE", "tag", "files"}
    source = Path(files.__file__).parent
    found = [
        (path.name, _written(node))
        for path in sorted(source.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _written(node)
    ]
    assert len(found) > 5
    assert [each for each in found if each[1] not in parts] == []
