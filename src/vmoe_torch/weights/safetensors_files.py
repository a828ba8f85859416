"""Files of safetensors, and what their headers say of the model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vmoe_torch.files import replacing
from vmoe_torch.layers.choice import FILE_KEY, metadata_of
from vmoe_torch.weights.original.wire import CheckpointError


def write_safetensors(
    path: str | os.PathLike, state: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Writes a state dict, with what it says of the model.

    Args:
        path: of the file.
        state: tensors that share no memory.
        header: what else the file says.

    Raises:
        OSError: if it cannot be written.
        KeyError: if safetensors has no such dtype.
    """
    metadata = dict(header or {})
    if said := metadata_of(state):
        metadata[FILE_KEY] = json.dumps(said, sort_keys=True)
    with replacing(path) as part:
        Path(part).touch()
        mode = os.stat(part).st_mode
        try:
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, part, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from None
        # Safetensors' own is for its owner alone.
        os.chmod(part, mode)


def read_header(path: str | os.PathLike, key: str) -> Any:
    """What the header of a safetensors file says as JSON; None if it does not.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(key, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} must be a readable safetensors file, got: {error}") from None
