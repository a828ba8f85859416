"""The original's checkpoints into our models and safetensors, and back; `models.weights` has the table of names."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from vmoe_torch.layers.choice import FILE_KEY, MODEL_KEY, ROUTING_KEY, metadata_of, with_metadata
from vmoe_torch.models.description import description_of
from vmoe_torch.weights.adapt import square_grid
from vmoe_torch.weights.names import from_original, split_members, to_original
from vmoe_torch.weights.original.reader import read_index, read_original
from vmoe_torch.weights.original.wire import CheckpointError
from vmoe_torch.weights.original.writer import MAX_CHUNK_BYTES, replacing, write_original
from vmoe_torch.weights.remote import is_remote

_METADATA = "vmoe_torch"
# What else a train state holds keeps its path, behind this.
_REST = "original/"
# Beside the original's files: what they have no place for, as `layers.choice.metadata_of` gives it.
_BESIDE = ".vmoe_torch.json"


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
    return {name: value for name, value in state.items() if not name.startswith(_REST)}


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
    state |= {_REST + path: value for path, value in arrays.items()}
    return with_metadata(state, _read_beside(prefix)), origin


def _read_beside(prefix: str) -> dict[str, dict[str, Any]]:
    path = Path(f"{prefix}{_BESIDE}")
    if is_remote(prefix) or not path.exists():
        return {}
    try:
        return _said(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be as export_original wrote it, got: {error}") from None


def _write_beside(prefix: str, metadata: Mapping[str, dict[str, Any]]) -> None:
    """Writes what would be lost, and nothing where the original's files say all."""
    path = Path(f"{prefix}{_BESIDE}")
    grid = metadata.get("", {}).get(MODEL_KEY, {}).get("grid", (1, 1))
    if grid[0] == grid[1] and not any(values.get(ROUTING_KEY) for values in metadata.values()):
        path.unlink(missing_ok=True)
        return
    with replacing(str(path)) as part:
        Path(part).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def export_original(
    source: nn.Module | Mapping[str, Tensor] | str | os.PathLike,
    prefix: str | os.PathLike,
    *,
    num_heads: int | None = None,
    num_shards: int = 1,
    max_chunk_bytes: int | None = MAX_CHUNK_BYTES,
) -> None:
    """Writes weights in the original's format.

    It has no place for a routing that was chosen, nor for a grid of patches that is not square: these go into a file
    PREFIX.vmoe_torch.json beside, which our readers of the format look at.

    Args:
        source: a model, a state dict, or a .safetensors file.
        prefix: local path that the files' names begin with.
        num_heads: attention heads; needed for a state dict, and for a file that `convert` has not written.
        num_shards: number of data files.
        max_chunk_bytes: arrays above this are cut.

    Raises:
        CheckpointError: if the file is damaged.
        ValueError: if the number of heads is not known, does not divide the width or is not that of the model or file,
            or the original has no such parameter.
    """
    origin = None
    if isinstance(source, nn.Module):
        state = source.state_dict()
        metadata = metadata_of(state)
        # Fixed positions are computed, in the original too.
        if getattr(source, "fixed_pos_embed", False):
            del state["pos_embed"]
        origin = Origin(source.blocks[0].attn.num_heads, getattr(source, "ensemble_size", 1))
    elif isinstance(source, Mapping):
        state, metadata = dict(source), metadata_of(source)
    else:
        state, origin = read_converted(source)
        metadata = metadata_of(state)
    described = metadata.get("", {}).get(MODEL_KEY, {})
    if origin is None and "num_heads" in described:
        origin = Origin(described["num_heads"])
        # Fixed positions are computed, in the original too.
        if described["model_args"].get("pos_embed") == "sincos2d":
            state.pop("pos_embed", None)
    if origin is None and num_heads is None:
        raise ValueError("num_heads must be given for weights that do not say it, got None")
    origin = origin or Origin(num_heads)
    if num_heads not in (None, origin.num_heads):
        raise ValueError(f"num_heads must be {origin.num_heads} or not given for these weights, got {num_heads}")
    members = {int(name[1]) for key in state if (name := re.match(r"blocks\.\d+\.mlp\.members\.(\d+)\.", key))}
    size = max(origin.ensemble_size, len(members))
    rest = {name.removeprefix(_REST): state.pop(name) for name in list(state) if name.startswith(_REST)}
    arrays = {origin.root + path: value for path, value in to_original(state, origin.num_heads, size).items()}
    write_original(prefix, arrays | rest, num_shards=num_shards, max_chunk_bytes=max_chunk_bytes, empty=origin.empty)
    _write_beside(os.fspath(prefix), metadata)
