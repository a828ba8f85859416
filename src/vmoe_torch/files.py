"""Files that are there whole or not at all, and the error for one that could not be written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WINDOWS = os.name == "nt"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Name of a file to write that takes the other's place in the end, on the disk; on an error nothing changes."""
    part = f"{os.fspath(path)}.part"
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
    sync(Path(path).parent)


def sync(path: str | os.PathLike) -> None:
    """Puts a file or folder onto the disk, so that a rename never comes before what it names.

    Windows opens no folders, and syncs only what may be written.
    """
    if WINDOWS and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(what: str, path: str | os.PathLike, text: str) -> None:
    """Writes a text file, its line ends as they are.

    Args:
        what: the file is, as "table".
        path: of the file.
        text: all of it; what UTF-8 cannot hold is escaped.

    Raises:
        OSError: if it cannot be written, naming it; then nothing has changed.
    """
    try:
        with replacing(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
    except OSError as error:
        raise cannot_write(what, Path(path), error) from error


def cannot_write(what: str, path: Path, error: BaseException, reason: str = "") -> OSError:
    """An error that names the file, the reason and the space that is free there.

    Args:
        what: the file is, as "checkpoint".
        path: of the file.
        error: what writing it raised.
        reason: where the error itself does not say it.
    """
    reason, number = reason or str(error).partition("\n")[0] or type(error).__name__, None
    # A writer that ran out of space may hide the system's error behind one of its own.
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is not None and error.errno is not None:
        number, reason = error.errno, os.strerror(error.errno)
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
    made = OSError(f"{what} {path} cannot be written: {reason}; {free / 2**20:.0f} MiB are free there")
    made.errno = number
    return made
