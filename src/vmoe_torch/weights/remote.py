"""Remote files: https and public gs:// with the standard library alone, everything else through fsspec.

A download goes to NAME.part and gets its name only when it is complete. It is resumed where the server can tell that
the file is still the same (an ETag or a date, kept in NAME.part.tag), and begins anew elsewhere.
"""

import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec

from vmoe_torch.files import sync
from vmoe_torch.weights.original.wire import CheckpointError

# Ends of the names of files with weights; other names are those of folders, or a PREFIX of the original's files.
SUFFIXES = (".pt", ".pth", ".tar", ".bin", ".ckpt", ".safetensors", ".npz")
_BLOCK = 1 << 20
_TIMEOUT_S = 60
_TRIES = 4


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return "://" in str(path)


def file_name(url: str) -> str:
    """The last part of a URL as the name of a file, which an escaped slash in it does not lead elsewhere."""
    # What is asked of a server, and what a part of an archive is in, say nothing of the file.
    path = re.split(r"[?#]" if url.startswith(("http://", "https://")) else "::", url, maxsplit=1)[0]
    return urllib.parse.unquote(path.rstrip("/").rpartition("/")[2]).replace("/", "_").replace("\\", "_")


def suffix_of(name: str) -> str:
    """That of `SUFFIXES` which a path or URL ends with, or ""."""
    name = file_name(name) if is_remote(name) else name
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


@contextmanager
def local_copy(url: str, progress: bool = False) -> Iterator[str]:
    """A temporary local copy of a remote file.

    Args:
        url: https://, gs://, or any URL that fsspec knows.
        progress: whether to show a bar.

    Raises:
        CheckpointError: if it cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="vmoe-") as folder:
        path = Path(folder) / file_name(url)
        download(url, path, progress=progress)
        yield str(path)


def download(url: str, path: str | os.PathLike, *, progress: bool = False, tries: int = _TRIES) -> None:
    """Downloads a file, on from where an earlier try stopped.

    Args:
        url: https://, gs://, or any URL that fsspec knows.
        path: of the local file; the part that is there so far is at PATH.part.
        progress: whether to show a bar.
        tries: how often a broken connection is taken up again.

    Raises:
        CheckpointError: if the file does not exist, or the connection stays broken; the part stays for the next call.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, tries + 1):
        try:
            fetch = _fetch_http if public_url(url).startswith(("http://", "https://")) else _fetch_fsspec
            fetch(public_url(url), part, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == tries:
                raise CheckpointError(f"{url} must be readable, got HTTP {error.code} {error.reason}") from None
        except FileNotFoundError:
            raise CheckpointError(f"{url} must exist, got no such file") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == tries:
                raise CheckpointError(
                    f"{url} could not be downloaded after {tries} tries: {error}. Without a network, put the files on "
                    f"disk and load them with pretrained_cfg_overlay=dict(file=PREFIX, custom_load=True)"
                ) from None
        time.sleep(0.1 * 4**attempt if attempt > 1 else 0)
    sync(part)
    os.replace(part, path)
    tag_file(part).unlink(missing_ok=True)


def tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def public_url(url: str) -> str:
    """Public objects of gs:// are served over https; gcsfs, where installed, knows the user's credentials."""
    if url.startswith("gs://") and find_spec("gcsfs") is None:
        return "https://storage.googleapis.com/" + url.removeprefix("gs://")
    return url


def _fetch_http(url: str, part: Path, progress: bool) -> None:
    tag = tag_file(part)
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    # The length counts, so nothing may be compressed on the way.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # Nothing beyond what is there: it came whole, or is not of this file. Begin anew.
        error.close()
        part.unlink()
        return _fetch_http(url, part, progress)
    with response:
        resumed = response.status == 206
        begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", f"bytes {have}-"))
        if resumed and (begins is None or int(begins[1]) != have):
            # The next try has nothing to go on from.
            tag.unlink(missing_ok=True)
            raise ConnectionError(f"the server must go on at byte {have}, got {response.headers['Content-Range']!r}")
        have = have if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with open(part, "ab" if resumed else "wb") as file:
            tag.unlink(missing_ok=True)
            validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if validator and not validator.startswith("W/"):
                tag.write_text(validator)
            _copy(response, file, have, total, url, progress)
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended at byte {part.stat().st_size} of {total}")


def _fetch_fsspec(url: str, part: Path, progress: bool) -> None:
    try:
        filesystem, remote = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{url} must have a protocol that fsspec can open here, got: {error}") from None
    info = filesystem.info(remote)
    total, validator, tag = info["size"], _validator(filesystem, remote, info), tag_file(part)
    same = part.exists() and tag.exists() and tag.read_text() == validator
    have = part.stat().st_size if same else 0
    if total is None or have > total:
        have = 0
    with filesystem.open(remote, "rb") as response, open(part, "ab" if have else "wb") as file:
        tag.unlink(missing_ok=True)
        if validator is not None:
            tag.write_text(validator)
        if have:
            response.seek(have)
        _copy(response, file, have, total, url, progress)
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended at byte {part.stat().st_size} of {total}")


def _validator(filesystem: fsspec.AbstractFileSystem, remote: str, info: dict[str, Any]) -> str | None:
    """What tells this version of a file from others, if anything does."""
    if found := info.get("ETag") or info.get("etag"):
        return str(found)
    try:
        return str(filesystem.modified(remote))
    # That it does not know is told by every file system in its own way.
    except Exception:
        return None


def _copy(response, file, have: int, total: int | None, url: str, progress: bool) -> None:
    with progress_bar(progress, total, url.rpartition("/")[2], have) as advance:
        while block := response.read(_BLOCK):
            file.write(block)
            advance(len(block))


@contextmanager
def progress_bar(shown: bool, total: int | None, title: str, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A function that takes the number of bytes that came in; with a tqdm bar where one is to be shown."""
    if not shown:
        yield lambda size: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=title) as bar:
        yield bar.update
