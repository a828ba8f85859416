"""The original's checkpoints into our models and safetensors, and back; `models.weights` has the table of names."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from vmoe_torch.checkpoints.fetch import is_remote
from vmoe_torch.checkpoints.reader import read_index, read_original
from vmoe_torch.checkpoints.wire import CheckpointError
from vmoe_torch.checkpoints.writer import MAX_CHUNK_BYTES, replacing, write_original
from vmoe_torch.models.weights import from_original, load_adapted, split_members, to_original

_METADATA = "vmoe_torch"
# What else a train state holds keeps its path, behind this.
_REST = "original/"


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


def load_original(prefix: str | os.PathLike, model: nn.Module, *, progress: bool = False) -> None:
    """Loads a checkpoint of the original, or a converted one, into a model.

    Resolution, patch size, channels and number of classes are adapted, as `models.weights.load_adapted` says.

    Args:
        prefix: what the names of the checkpoint's files begin with (a local path or a URL), or a .safetensors file.
        model: a VMoE or VMoEEnsemble; nothing in it changes on an error.
        progress: whether to show a bar.

    Raises:
        CheckpointError: if a file is damaged or missing.
        ValueError: if a parameter does not fit the model.
    """
    prefix = os.fspath(prefix)
    state, origin = read_converted(prefix) if prefix.endswith(".safetensors") else read_state(prefix, progress=progress)
    size = 1 if origin is None else origin.ensemble_size
    # Files without the members' dim may be an ensemble's too, as those that fine-tuning begins from.
    if size not in (1, model.ensemble_size):
        raise ValueError(f"{prefix} must be loaded into an ensemble of {size} members, got {model.ensemble_size}")
    load_adapted(model, {name: value for name, value in state.items() if not name.startswith(_REST)}, prefix)


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
    return state | {_REST + path: value for path, value in arrays.items()}, origin


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

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return state, None if metadata is None else Origin(**json.loads(metadata))
    except (OSError, safetensors.SafetensorError, TypeError, json.JSONDecodeError) as error:
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
        # Fixed positions are computed, in the original too.
        if getattr(source, "fixed_pos_embed", False):
            del state["pos_embed"]
        origin = Origin(source.blocks[0].attn.num_heads, getattr(source, "ensemble_size", 1))
    elif isinstance(source, Mapping):
        state = dict(source)
    else:
        state, origin = read_converted(source)
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
