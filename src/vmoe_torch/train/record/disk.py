"""Files that could not be written, told so that a person knows what to do."""

import os
import shutil
from pathlib import Path


def cannot_write(what: str, path: Path, error: Exception) -> OSError:
    """An error that names the file, the reason and the space that is free there.

    Args:
        what: the file is, as "checkpoint".
        path: of the file.
        error: what writing it raised.
    """
    reason, number = str(error).partition("\n")[0] or type(error).__name__, None
    # A writer that ran out of space may hide the system's error behind one of its own.
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is not None and error.errno is not None:
        number, reason = error.errno, os.strerror(error.errno)
    free = shutil.disk_usage(path.parent).free
    text = f"{what} {path} cannot be written: {reason}; {free / 2**20:.0f} MiB are free there"
    made = OSError(text)
    made.errno = number
    return made
