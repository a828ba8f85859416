"""The original's checkpoints, and the safetensors files they become, as state dicts of ours by the table in `names`."""

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from torch import Tensor

from vmoe_torch.layers.choice import FILE_KEY, with_metadata
from vmoe_torch.weights.names import from_original, split_members
from vmoe_torch.weights.original.reader import read_index, read_original
from vmoe_torch.weights.original.wire import CheckpointError
from vmoe_torch.weights.remote import is_remote
from vmoe_torch.weights.safetensors_files import write_safetensors

_METADATA = "vmoe_torch"
# What else a train state holds keeps its path, behind this.
REST = "original/"
# Beside the original's files: what they have no place for, as `layers.choice.metadata_of` gives it.
BESIDE = ".vmoe_torch.json"
# What numpy raises of a damaged archive, beside the usual; a file that is none it takes for an array, without names.
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, AttributeError, MemoryError)


@dataclass
class Origin:
    """What the original's layout has and a state dict has not."""

    num_heads: int
    """Number of attention heads."""
    ensemble_size: int = 1
    """M, where routers are (D, M, E / M); 1 elsewhere."""
    root: str = ""
    """What the parameters' paths begin with: "params/" in a train state, "" where they stand alone."""
    empty: dict[str, dict | None] = field(default_factory=dict)
    """Nodes of the tree without arrays."""


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, without what else a train state holds."""
    return {name: value for name, value in state.items() if not name.startswith(REST)}


def read_state(prefix: str, *, train_state: bool = False, progress: bool = False) -> tuple[dict[str, Tensor], Origin]:
    """Reads a checkpoint of the original as a state dict of ours.

    Args:
        prefix: what the names of its files begin with.
        train_state: whether to read all that is not a parameter too, as "original/" and its path.
        progress: whether to show a bar.

    Returns:
        The state dict, and what is needed for the way back.

    Raises:
        CheckpointError: if a file is damaged or missing, or a parameter is not one of the original's.
    """
    index = read_index(prefix)
    root = _root(leaf.path for leaf in index.leaves)
    arrays = read_original(prefix, keep=None if train_state else lambda path: path.startswith(root), progress=progress)
    state, origin = _converted(arrays, root, prefix)
    if train_state:
        origin.root, origin.empty = root, index.empty
    state |= {REST + path: value for path, value in arrays.items()}
    return with_metadata(state, _read_beside(prefix)), origin


def read_npz(path: str | os.PathLike, prefix: str = "") -> tuple[dict[str, Tensor], Origin]:
    """Reads an .npz with the original's names, or a plain ViT's.

    Args:
        path: of the file.
        prefix: what the names of the wanted arrays begin with; those of a train state are found without.

    Returns:
        The state dict, and what is needed for the way back.

    Raises:
        CheckpointError: if the file is damaged, no array has the prefix, or a name is not one of the original's.
    """
    try:
        # Opened here, as numpy leaves a damaged archive open.
        with open(path, "rb") as raw, np.load(raw) as file:
            root = prefix or _root(file.files)
            arrays = {name: file[name] for name in file.files if name.startswith(root)}
    except (*_DAMAGED, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} must be a readable .npz file, got: {error}") from None
    if not arrays:
        raise CheckpointError(f"{path} must hold arrays named {prefix}..., found none")
    return _converted(arrays, root, path)


def _root(paths: Iterable[str]) -> str:
    return "params/" if any(path.startswith("params/") for path in paths) else ""


def _converted(
    arrays: dict[str, Tensor | np.ndarray], root: str, source: str | os.PathLike
) -> tuple[dict[str, Tensor], Origin]:
    """The parameters, taken out of the arrays, as a state dict; and what it has not."""
    params = {path.removeprefix(root): arrays.pop(path) for path in list(arrays) if path.startswith(root)}
    split = {path: array.shape[1] for path, array in params.items() if path.endswith("/kernel") and array.ndim == 3}
    heads = {size for path, size in split.items() if "encoderblock_" in path and path.endswith("/query/kernel")}
    members = {size for path, size in split.items() if path.endswith("Router/dense/kernel")} or {1}
    for who, what, numbers in (("attention", "heads", heads), ("routers", "members", members)):
        if len(numbers) != 1:
            raise CheckpointError(
                f"{source}: {who} must have one number of {what} in every block, got {sorted(numbers)}"
            )
    origin = Origin(heads.pop(), members.pop())
    try:
        state = from_original(params)
        return (split_members(state, origin.ensemble_size) if origin.ensemble_size > 1 else state), origin
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _read_beside(prefix: str) -> dict[str, dict[str, Any]]:
    path = Path(f"{prefix}{BESIDE}")
    if is_remote(prefix) or not path.exists():
        return {}
    try:
        return _said(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be as export_original wrote it, got: {error}") from None


def _said(text: str) -> dict[str, dict[str, Any]]:
    """What a file says of the model, checked."""
    found = json.loads(text)
    if not isinstance(found, dict) or any(not isinstance(values, dict) for values in found.values()):
        raise ValueError("it does not say a routing of modules")
    return found


def convert(
    prefix: str | os.PathLike, out: str | os.PathLike, *, train_state: bool = False, progress: bool = False
) -> None:
    """Converts a checkpoint of the original to one safetensors file, with the names of `VMoE`.

    The same checkpoint gives the same bytes, and `export_original` gives back its arrays bit for bit.

    Args:
        prefix: what the names of its files begin with, a local path or a URL.
        out: the file to write; it gets its name when it is complete.
        train_state: whether to keep the optimizer, the step and the random keys too.
        progress: whether to show a bar.

    Raises:
        CheckpointError: if a file is damaged or missing, or a parameter is not one of the original's.
        OSError: if the file cannot be written.
        ValueError: if it is not a local one, or safetensors has no such dtype (complex128).
    """
    if is_remote(out):
        raise ValueError(f"the file to write must be a local one, got {out}")
    state, origin = read_state(os.fspath(prefix), train_state=train_state, progress=progress)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        # One key, as the order of several is not fixed.
        write_safetensors(out, state, {_METADATA: json.dumps(asdict(origin), sort_keys=True)})
    except KeyError as error:
        raise ValueError(f"{prefix}: dtypes must be those of safetensors, got {error}") from None


def read_converted(path: str | os.PathLike) -> tuple[dict[str, Tensor], Origin | None]:
    """Reads a safetensors file; the second is None where it does not come from `convert`.

    What the file says of the model is in the state dict's metadata, as PyTorch would keep it.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        origin = Origin(**json.loads(header[_METADATA])) if _METADATA in header else None
        return with_metadata(state, _said(header.get(FILE_KEY, "{}"))), origin
    except (OSError, safetensors.SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} must be a readable safetensors file, got: {error}") from None
