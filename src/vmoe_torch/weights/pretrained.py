"""Weights of a URL in the cache: fetched once, converted once, and refused if they ever change."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

from vmoe_torch.files import replacing
from vmoe_torch.weights.conversion import convert
from vmoe_torch.weights.original.reader import read_index, shard_name
from vmoe_torch.weights.original.wire import CheckpointError
from vmoe_torch.weights.remote import download, file_name, suffix_of


def cached_checkpoint(url: str, cache_dir: str | os.PathLike | None = None, *, progress: bool = False) -> Path:
    """The cached file of remote weights; when there is none yet, downloads it, and converts what is of the original.

    Beside the file lies its sha256 as first seen. It is checked at every call, also after the file had to be fetched
    anew. Processes of one machine wait for the one that fetches.

    Args:
        url: of a file of weights, or what the URLs of the original's files begin with.
        cache_dir: of the file; None is torch.hub's, as for timm's own weights.
        progress: whether to show bars.

    Returns:
        Path of the file, a .safetensors file where it is converted.

    Raises:
        CheckpointError: if it is neither cached nor to be had, is damaged, or is not what was first seen.
    """
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    suffix = suffix_of(url)
    # One name in two places is that of two checkpoints.
    stem = f"{file_name(url).removesuffix(suffix)}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    path = folder / f"{stem}{suffix or '.safetensors'}"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                raise CheckpointError(
                    f"{url} must be in the cache when HF_HUB_OFFLINE is set, got no {path}; fetch it once online, or "
                    f"load files on disk with pretrained_cfg_overlay=dict(file=PREFIX, custom_load=True)"
                )
            if suffix:
                download(url, path, progress=progress)
            else:
                _fetch(url, folder / f"{stem}.download", path, progress)
        _check(path)
    return path


def _fetch(url: str, folder: Path, path: Path, progress: bool) -> None:
    """Downloads all files, on from where an earlier call stopped, and converts them."""
    prefix = str(folder / "checkpoint")
    _download_once(f"{url}.index", f"{prefix}.index", progress)
    with _discarding(folder):
        index = read_index(prefix)
    for shard in sorted({shard for leaf in index.leaves for shard in leaf.shards}):
        names = (shard_name(base, shard, index.shard_count) for base in (url, prefix))
        _download_once(*names, progress)
    with _discarding(folder):
        convert(prefix, path, progress=progress)
    shutil.rmtree(folder)


def _download_once(url: str, path: str, progress: bool) -> None:
    if not Path(path).exists():
        download(url, path, progress=progress)


@contextmanager
def _discarding(folder: Path) -> Iterator[None]:
    """Files that came whole but are no checkpoint must not be found by the next call."""
    try:
        yield
    except ValueError:
        shutil.rmtree(folder)
        raise


def _check(path: Path) -> None:
    record = path.with_name(path.name + ".sha256")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not record.exists():
        with replacing(str(record)) as part:
            Path(part).write_text(f"{found}  {path.name}\n")
    first = record.read_text().split()[:1]
    if first != [found]:
        raise CheckpointError(
            f"{path} must have the sha256 recorded when it was first seen, {''.join(first)}, got {found}; "
            f"delete the file to fetch it again, and {record.name} too to accept a change"
        )
