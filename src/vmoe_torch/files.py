"""Files that are there whole or not at all, and the error for one that could not be written."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WINDOWS = os.name == "nt"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Name of a file to write that takes the other's place in the end, on the disk; on an error nothing changes.

    A link goes on to be one: what it names is replaced. What is no file, as a named pipe or /dev/stdout wherever that
    leads, is written itself.
    """
    stream = os.path.islink(path) and os.path.abspath(path).startswith("/dev/")
    if stream or (os.path.exists(path) and not os.path.isfile(path)):
        yield os.fspath(path)
        return
    path = os.path.realpath(path)
    part = f"{path}.part"
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


def write_json(what: str, path: str | os.PathLike, content: Any) -> None:
    """Writes plain values as JSON, as `write_text` does.

    Raises:
        OSError: as `write_text`.
        TypeError: if JSON cannot say a value; then nothing has changed.
    """
    write_text(what, path, json.dumps(content, indent=1) + "\n")


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The text of a CSV file: a line of the columns' names, and the rows; None is empty, other columns are left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
