"""A run's checkpoints on disk: which there are, whether they are whole, and what they hold.

Each is a folder `update_00000012` with the tensors of model, moving average and optimiser, as
torch.distributed.checkpoint (DCP) lays them out, everything else in `state.pt`, and the files' sizes and checksums in
`complete.json`. Earlier versions wrote a file `update_00000012.pt` where a run was not spread; those are read, too.
Nothing that a file holds is run.
"""

import json
import pickle
import re
import shutil
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as layout
from torch.distributed.checkpoint.api import CheckpointException

from vmoe_torch.layers.choice import with_metadata

STATE, COMPLETE = "state.pt", "complete.json"
# What the names of tensors begin with.
MODEL, AVERAGE, OPTIMIZER = "model.", "average.", "optimizer."


def is_update(path: Path) -> bool:
    """Whether a file or folder is a checkpoint by its name, whole or not."""
    return re.fullmatch(r"update_\d{8,}" + ("" if path.is_dir() else r"\.pt"), path.name) is not None


def updates_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(filter(is_update, folder.glob("update_*")))


def remove(path: Path) -> None:
    """Removes a checkpoint, or what is left of one; no part of it keeps its name."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.part")))
    else:
        path.unlink(missing_ok=True)


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything; the readers of torch do not look at the checksums."""
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as file:
                changed = file.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            return str(error)
        return None if changed is None else f"{changed} has changed"
    try:
        files = json.loads((path / COMPLETE).read_text())
    except (OSError, ValueError) as error:
        return f"{COMPLETE} cannot be read ({error})"
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} must have {size} bytes, has {file.stat().st_size}"
        if checksum(file) != crc:
            return f"{name} has changed"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def read_update(path: Path) -> dict[str, Any]:
    """What the folder of a run's checkpoint holds but for the optimiser's tensors, whole and on the CPU.

    Returns:
        The `state` that was saved, and the state dicts "model" and "ema"; the latter is None where no moving average
        was kept.

    Raises:
        ValueError: if it is damaged or cannot be read.
    """
    problem = problem_of(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    saved, states = read_beside(path), {MODEL: {}, AVERAGE: {}}
    for kind, state in states.items():
        for name, entry in read_entries(path).items():
            if name.startswith(kind):
                state[name.removeprefix(kind)] = torch.empty(entry.size, dtype=entry.properties.dtype)
        read_tensors(path, {f"{kind}{name}": tensor for name, tensor in state.items()}, alone=True)
    model, average = (with_metadata(state, saved.get("model", {})) for state in states.values())
    return {**saved["state"], "model": model, "ema": average or None, "optimizer": None}


def read_beside(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds beside tensors; a ValueError if it cannot be read."""
    with _readable(path):
        return torch.load(path / STATE, map_location="cpu", weights_only=True)


def read_entries(path: Path) -> dict[str, layout.TensorStorageMetadata]:
    """Shapes and dtypes of a checkpoint's tensors by name; a ValueError if they cannot be read."""
    with _readable(path):
        entries = _Reader(path).read_metadata().state_dict_metadata
        if others := [name for name, entry in entries.items() if not isinstance(entry, layout.TensorStorageMetadata)]:
            raise TypeError(f"{others[0]} is no tensor")
    return entries


def read_tensors(
    path: Path, wanted: dict[str, Tensor], *, alone: bool = False, group: dist.ProcessGroup | None = None
) -> None:
    """Fills tensors by name, each rank its parts of DTensors.

    Args:
        path: a checkpoint's folder.
        wanted: what to fill, of the shapes that `read_entries` gives.
        alone: whether the other ranks do not call this.
        group: the ranks that call this together; None is all.

    Raises:
        ValueError: if a file cannot be read.
    """
    with warnings.catch_warnings(), _readable(path):
        # That there is one process is what we want to say.
        warnings.simplefilter("ignore", UserWarning)
        alone = alone or not dist.is_initialized()
        dcp.load(wanted, storage_reader=_Reader(path), process_group=group, no_dist=alone)


def reason_of(error: BaseException) -> str:
    """One line: of DCP's error, what the first failing rank says."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    # DCP's is no Exception.
    except (Exception, CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error


class _Reader(dcp.FileSystemReader):
    """DCP's, which unpickles metadata, and nothing else that a file may name."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> layout.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            found = _Unpickler(file).load()
        found.storage_meta = layout.StorageMeta()
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return PurePosixPath
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout):
            return found
        if isinstance(found, type) and (found.__module__ == layout.__name__ or found is filesystem._StorageInfo):
            return found
        raise pickle.UnpicklingError(f"it must not name {module}.{name}")
