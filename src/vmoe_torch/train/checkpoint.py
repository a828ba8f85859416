"""Checkpoints: written whole or not at all, checked before they change anything, and enough to go on bit by bit.

A checkpoint file holds plain tensors, numbers and strings only, so it loads without running code.
"""

import os
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmoe_torch.train.build import build_model
from vmoe_torch.train.config import Config
from vmoe_torch.train.record.disk import cannot_write
from vmoe_torch.weights.sources import RUN_FORMAT, read_weights

FORMAT = RUN_FORMAT
BEST = "best.pt"


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


class CheckpointFolder:
    """The checkpoints of a run: the last few by update, and the best.

    Args:
        folder: where they are; made when the first is written.
        keep: how many of the last to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self.damaged: list[Path] = []

    def last(self) -> Path | None:
        """The newest checkpoint, if there is any."""
        paths = self._numbered()
        return paths[-1] if paths else None

    def usable(self) -> Path | None:
        """The newest checkpoint that is whole, if there is any; newer ones are named in warnings."""
        for path in reversed(self._numbered()):
            problem = _problem(path)
            if problem is None:
                return path
            self.damaged.append(path)
            warnings.warn(f"checkpoint {path} is damaged, skipped: {problem}", stacklevel=2)
        return None

    def save(self, state: dict[str, Any], best: bool = False) -> Path:
        """Writes a checkpoint, also as the best if it is; removes those beyond `keep` and those found damaged."""
        if best:
            self.save_best(state)
        else:
            self._prepare()
        path = self.folder / f"update_{state['update']:08d}.pt"
        write_atomically(path, state)
        while self.damaged:
            if (damaged := self.damaged.pop()) != path:
                damaged.unlink(missing_ok=True)
        # Later ones, of another try, must not push this one out.
        for old in [other for other in self._numbered() if other <= path][: -self.keep]:
            old.unlink()
        return path

    def save_best(self, state: dict[str, Any]) -> None:
        """Writes the best checkpoint. To be done before the numbered one of that moment, which says that it is there:
        a run that is killed in between does both again."""
        self._prepare()
        write_atomically(self.folder / BEST, state)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Left by a process that was killed while it wrote.
        for partial in self.folder.glob(".*.pt.*"):
            partial.unlink(missing_ok=True)

    def _numbered(self) -> list[Path]:
        return sorted(self.folder.glob("update_*.pt"))


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a neighbour, to the disk, then a rename: a reader sees the old file or the new, never a part.

    Raises:
        OSError: if that fails, with the path, the reason and the free space; then nothing has changed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    # torch's writer has a RuntimeError for a file that takes no more.
    except (OSError, RuntimeError) as error:
        raise cannot_write("checkpoint", path, error) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _problem(path: Path) -> str | None:
    """What is wrong with a file, if anything; torch's own reader does not look at the checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            changed = file.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return None if changed is None else f"{changed} has changed"


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint file, or the best (else the last) checkpoint of a run folder, onto the CPU.

    Raises:
        ValueError: if there is none, or it is not a checkpoint of ours.
    """
    if Path(path).is_file() and Path(path).suffix in (".npz", ".safetensors"):
        raise ValueError(f"{path} must be a checkpoint of vmoe train (format {FORMAT}), got another file")
    run = read_weights(path).run
    if run is None:
        raise ValueError(f"{path} must be a checkpoint of vmoe train (format {FORMAT}), got another file")
    return run


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies weights into a model of exactly the same keys and shapes.

    Raises:
        ValueError: if keys are missing or too many, or shapes differ, naming them; then nothing has changed.
    """
    own = model.state_dict()
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
    state = read_checkpoint(path)
    model, config, class_names = model_of(state)
    return model.to(device).eval(), config, class_names


def model_of(state: dict[str, Any], average: bool = True) -> tuple[nn.Module, Config, tuple[str, ...]]:
    """The same of what `read_checkpoint` gave, on the CPU as it was made.

    Args:
        state: a checkpoint.
        average: whether to take the moving average, where there is one.
    """
    config = Config.from_dict(state["config"])
    class_names = tuple(state["class_names"])
    model = build_model(config.model, len(class_names))
    load_weights(model, state["ema"] if average and state["ema"] is not None else state["model"])
    return model, config, class_names
