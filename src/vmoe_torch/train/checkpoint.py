"""Checkpoints: written whole or not at all, checked before they change anything, and enough to go on bit by bit.

They hold plain tensors, numbers and strings only, so they load without running code.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmoe_torch.files import cannot_write, replacing
from vmoe_torch.layers.int8_experts import as_loaded
from vmoe_torch.train.build import build_model
from vmoe_torch.train.config import Config
from vmoe_torch.weights.safetensors_files import write_safetensors
from vmoe_torch.weights.sources import RUN_FORMAT, RUN_KEY, read_weights

FORMAT = RUN_FORMAT


def random_states() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and CUDA's generators."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(numbers), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Puts the generators back to what `random_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a neighbour, to the disk, then a rename: a reader sees the old file or the new, never a part.

    Raises:
        OSError: if that fails, with the path, the reason and the free space; then nothing has changed.
    """
    try:
        with replacing(path) as part, open(part, "wb") as file:
            torch.save(state, file)
    # torch's writer has a RuntimeError for a file that takes no more.
    except (OSError, RuntimeError) as error:
        raise cannot_write("checkpoint", path, error) from error


def write_best(path: Path, weights: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Writes weights of a run as one safetensors file, whose header says what a person and a program want to know.

    Args:
        path: of the file; its folder is made.
        weights: a state dict.
        run: what is known of them, in values for JSON: the run's "config", "class_names" and others.

    Raises:
        OSError: if that fails, with the path, the reason and the free space; then nothing has changed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, weights, {"format": "pt", RUN_KEY: json.dumps({"format": FORMAT, **run})})
    except OSError as error:
        raise cannot_write("checkpoint", path, error) from error


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint, or the best (else the last) checkpoint of a run folder, onto the CPU.

    Returns:
        What is known of the moment, as "config", "class_names" and "update", and the state dicts "model" and "ema",
        None where the checkpoint does not hold them: the best one holds the moving average alone, where there is one.

    Raises:
        ValueError: if there is none, or it is not a checkpoint of ours.
    """
    run = None if Path(path).suffix == ".npz" else read_weights(path).run
    if run is None:
        raise ValueError(f"{path} must be a checkpoint of vmoe train (format {FORMAT}), got another file")
    return run


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a model of exactly the same keys and shapes.

    Raises:
        ValueError: if keys are missing or too many, or shapes differ, naming them; then nothing has changed.
    """
    own = as_loaded(model.state_dict(), weights)
    problems = [
        (f"missing {len(missing)}", missing) if (missing := sorted(own.keys() - weights.keys())) else None,
        (f"unknown {len(unknown)}", unknown) if (unknown := sorted(weights.keys() - own.keys())) else None,
    ]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if shapes:
        problems.append((f"of another shape {len(shapes)}", shapes))
    texts = [f"{title}: {_some(names)}" for title, names in filter(None, problems)]
    if texts:
        raise ValueError(f"checkpoint does not fit the model; keys {'; '.join(texts)}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # Keys and shapes fit: what is left is a routing that a layer does not take.
        raise ValueError(f"checkpoint does not fit the model; {' '.join(str(error).split())}") from None


def _some(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def load_model(path: Path | str, device: str | torch.device = "cpu") -> tuple[nn.Module, Config, tuple[str, ...]]:
    """The trained model of a run, in eval mode; with its moving average as weights, where the run kept one.

    Args:
        path: a run folder (its best checkpoint) or a checkpoint file.
        device: where to put the model.

    Returns:
        (model, configuration of the run, class names).

    Raises:
        ValueError: if there is no checkpoint or it does not fit.
    """
    run = read_checkpoint(path)
    model, config, class_names = model_of(run, run["model"] if run["ema"] is None else run["ema"])
    return model.to(device).eval(), config, class_names


def model_of(run: dict[str, Any], weights: Mapping[str, Tensor]) -> tuple[nn.Module, Config, tuple[str, ...]]:
    """The same of what `read_checkpoint` gave and weights in it, on the CPU as it was made."""
    config, class_names = Config.from_dict(run["config"]), tuple(run["class_names"])
    model = build_model(config.model, len(class_names))
    load_weights(model, weights)
    return model, config, class_names
