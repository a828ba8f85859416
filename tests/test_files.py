"""Files that are there whole or not at all."""

import errno
import os
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
