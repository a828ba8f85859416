"""The original's checkpoints into our models and safetensors, and back; `models.weights` has the table of names."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from vmoe_torch.layers.choice import FILE_KEY, description_of, metadata_of, with_metadata
from vmoe_torch.weights.grid import square_grid
from vmoe_torch.weights.names import from_original, split_members
from vmoe_torch.weights.original.reader import read_index, read_original
from vmoe_torch.weights.original.wire import CheckpointError
from vmoe_torch.weights.original.writer import replacing
from vmoe_torch.weights.remote import is_remote

_METADATA = "vmoe_torch"
# What else a train state holds keeps its path, behind this.
REST = "original/"
# Beside the original's files: what they have no place for, as `layers.choice.metadata_of` gives it.
BESIDE = ".vmoe_torch.json"


@dataclass
class Origin:
    """What the original's layout has and a state dict has not.

    Attributes:
        num_heads: attention heads.
        ensemble_size: M, where routers are (D, M, E / M); 1 elsewhere.
        root: "params/" in a train state, "" where the parameters stand alone.
        empty: nodes of the tree without arrays.
    """

    num_heads: int
    ensemble_size: int = 1
    root: str = ""
    empty: dict[str, dict | None] = field(default_factory=dict)


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, without what else a train state holds."""
    return {name: value for name, value in state.items() if not name.startswith(REST)}


def source_grid(state: Mapping[str, Tensor], origin: Origin | None) -> tuple[int, int] | None:
    """Rows and columns of the patches that a state dict has positions for, where they are known."""
    described = description_of(state)
    if described is not None:
        return tuple(described["grid"])
    return None if origin is None else square_grid(state)


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
    root = "params/" if any(leaf.path.startswith("params/") for leaf in index.leaves) else ""
    arrays = read_original(prefix, keep=None if train_state else lambda path: path.startswith(root), progress=progress)
    params = {path.removeprefix(root): arrays.pop(path) for path in list(arrays) if path.startswith(root)}
    heads = {
        a.shape[1] for path, a in params.items() if path.endswith(("SelfAttention/query/kernel",)) and a.dim() == 3
    }
    if len(heads) != 1:
        raise CheckpointError(f"{prefix}: attention must have one number of heads in every block, got {sorted(heads)}")
    members = {a.shape[1] for path, a in params.items() if path.endswith("Router/dense/kernel") and a.dim() == 3}
    if len(members) > 1:
        raise CheckpointError(f"{prefix}: routers must have one number of members, got {sorted(members)}")
    origin = Origin(heads.pop(), members.pop() if members else 1)
    if train_state:
        origin.root, origin.empty = root, index.empty
    try:
        state = from_original(params)
        if origin.ensemble_size > 1:
            state = split_members(state, origin.ensemble_size)
    except ValueError as error:
        raise CheckpointError(f"{prefix}: {error}") from None
    state |= {REST + path: value for path, value in arrays.items()}
    return with_metadata(state, _read_beside(prefix)), origin


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
    with replacing(os.fspath(out)) as part:
        Path(part).touch()
        mode = os.stat(part).st_mode
        # One key, as the order of several is not fixed.
        metadata = {_METADATA: json.dumps(asdict(origin), sort_keys=True)}
        if said := metadata_of(state):
            metadata[FILE_KEY] = json.dumps(said, sort_keys=True)
        try:
            safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, part, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{out} could not be written: {error}") from None
        except KeyError as error:
            raise ValueError(f"{prefix}: dtypes must be those of safetensors, got {error}") from None
        # Safetensors' own is for its owner alone.
        os.chmod(part, mode)


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
