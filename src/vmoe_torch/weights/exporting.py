"""Weights in the original's format."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_torch.files import replacing
from vmoe_torch.layers.choice import MODEL_KEY, ROUTING_KEY, metadata_of
from vmoe_torch.weights.conversion import BESIDE, REST, Origin
from vmoe_torch.weights.names import to_original
from vmoe_torch.weights.original.writer import MAX_CHUNK_BYTES, write_original
from vmoe_torch.weights.sources import read_weights


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
        source: a model, a state dict, or what `read_weights` reads.
        prefix: local path that the files' names begin with.
        num_heads: attention heads; needed for a state dict, and for a file that `convert` has not written.
        num_shards: number of data files.
        max_chunk_bytes: arrays above this are cut.

    Raises:
        CheckpointError: if the file is damaged.
        ValueError: if the number of heads is not known, does not divide the width or is not that of the model or file,
            experts are int8, or the original has no such parameter.
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
        weights = read_weights(source)
        state, origin, metadata = dict(weights.state), weights.origin, metadata_of(weights.state)
    if int8 := sorted(name for name, value in state.items() if value.dtype == torch.int8):
        raise ValueError(
            f"experts must be of floating point for the original's format, got int8 in {int8[0]}: export the weights "
            "that they were made of"
        )
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
    rest = {name.removeprefix(REST): state.pop(name) for name in list(state) if name.startswith(REST)}
    arrays = {origin.root + path: value for path, value in to_original(state, origin.num_heads, size).items()}
    write_original(prefix, arrays | rest, num_shards=num_shards, max_chunk_bytes=max_chunk_bytes, empty=origin.empty)
    _write_beside(os.fspath(prefix), metadata)


def _write_beside(prefix: str, metadata: Mapping[str, dict[str, Any]]) -> None:
    """Writes what would be lost, and nothing where the original's files say all."""
    path = Path(f"{prefix}{BESIDE}")
    grid = metadata.get("", {}).get(MODEL_KEY, {}).get("grid", (1, 1))
    if grid[0] == grid[1] and not any(values.get(ROUTING_KEY) for values in metadata.values()):
        path.unlink(missing_ok=True)
        return
    with replacing(str(path)) as part:
        Path(part).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8")
