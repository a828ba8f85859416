"""Checkpoints that know no number of ranks: torch.distributed.checkpoint, asynchronous, whole or not at all.

A checkpoint is a folder `update_00000012` with the tensors of model and optimiser, as DCP lays them out, everything
else in `state.pt`, and the files' sizes and checksums in `complete.json`. It is written under a hidden name and renamed
when all ranks are done.
"""

import io
import json
import os
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vmoe_torch.layers.choice import FILE_KEY, metadata_of, restore_routing, with_metadata
from vmoe_torch.parallel.mesh import group_timeout
from vmoe_torch.parallel.ranks.agreement import on_first
from vmoe_torch.parallel.writing import Writing, reason_of, writes

_STATE, _COMPLETE = "state.pt", "complete.json"
# What an optimiser's group holds beside options.
_NOT_OPTIONS = ("params", "param_names")


class ShardedCheckpoints:
    """The last few checkpoints of a run; all ranks must call its methods together.

    Args:
        folder: where they are; made when the first is written.
        keep: how many to keep.

    With one process and no process group, everything works alike.
    """

    def __init__(self, folder: Path | str, keep: int):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.distributed = dist.is_initialized()
        self.timeout = group_timeout() if self.distributed else None
        # A group of its own: a thread uses it while one writes, beside those of the training, and nobody else does.
        self.group = dist.new_group(backend="gloo", timeout=self.timeout) if self.distributed else None
        self.first = not self.distributed or dist.get_rank() == 0
        self.writing: Writing | None = None
        self.damaged: list[Path] = []

    def save(self, update: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Copies the tensors and returns; a thread writes them, and completes the checkpoint when all ranks are done.

        Args:
            update: number of the checkpoint.
            model: parallelised or not.
            optimizer: of its parameters.
            state: everything else, equal on all ranks: plain tensors, numbers, strings, and lists and dicts of them.

        Raises:
            OSError: if the one before could not be written; or this one, where no other process takes part.
        """
        self.wait()
        tensors, numbers = _tensors_and_numbers(model, optimizer)
        beside = io.BytesIO()
        if self.first:
            saved = {"state": state, "optimizer": numbers, "options": _options(model, optimizer)}
            saved["model"] = metadata_of(model.state_dict())
            torch.save(saved, beside)
        partial = self.folder / f".update_{update:08d}"

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(".update_*"):
                shutil.rmtree(old)
            partial.mkdir()
            (partial / _STATE).write_bytes(beside.getvalue())

        def complete() -> None:
            self._complete(partial, update)

        if self.distributed:
            tensors = BlockingAsyncStager().stage(tensors)
            self.writing = Writing(self.folder, self.group)
            self.writing.begin(tensors, partial, prepare, complete)
            return
        with warnings.catch_warnings(), writes(self.folder):
            # That there is one process is what we want to say.
            warnings.simplefilter("ignore", UserWarning)
            prepare()
            dcp.save(tensors, checkpoint_id=partial, no_dist=True)
            complete()

    def _complete(self, partial: Path, update: int) -> None:
        """Lists the files, renames the folder, and removes those beyond `keep` and those found damaged."""
        files = sorted(path for path in partial.iterdir())
        (partial / _COMPLETE).write_text(json.dumps({path.name: [path.stat().st_size, _crc(path)] for path in files}))
        for path in (*files, partial / _COMPLETE, partial):
            _sync(path)
        final = self.folder / f"update_{update:08d}"
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(self.folder)
        while self.damaged:
            if (damaged := self.damaged.pop()) != final:
                shutil.rmtree(damaged, ignore_errors=True)
        # Later ones, of another try, must not push this one out.
        for old in [path for path in self._numbered() if path <= final][: -self.keep]:
            shutil.rmtree(old)

    def wait(self) -> None:
        """Until the checkpoint being written is complete, on all ranks.

        Raises:
            OSError: on all ranks, if it could not be written, or the disk of one does not answer within the timeout of
                the process group.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.wait(self.timeout)

    def any(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return bool(self._numbered())

    def state(self, path: Path) -> dict[str, Any]:
        """The `state` of a checkpoint, without its tensors."""
        return _read_state(path)["state"]

    def usable(self) -> list[Path]:
        """Complete and undamaged checkpoints, the newest first; others are named in warnings of the first rank.

        Waits for one that is being written.
        """
        self.wait()
        found, skipped = on_first(self._look, self.group)
        # Warnings may be errors, and that of one rank.
        for text in skipped if self.first else ():
            warnings.warn(text, stacklevel=2)
        return found

    def _look(self) -> tuple[list[Path], list[str]]:
        """The usable ones, and what to say of the others."""
        found = []
        skipped = [f"checkpoint {path} is half-written, skipped" for path in sorted(self.folder.glob(".update_*"))]
        for path in reversed(self._numbered()):
            problem = _problem(path)
            if problem is None:
                found.append(path)
            else:
                self.damaged.append(path)
                skipped.append(f"checkpoint {path} is damaged, skipped: {problem}")
        return found, skipped

    def load(self, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any] | None:
        """Loads the newest usable checkpoint in place, saved by any number of ranks; waits for one being written.

        Args:
            model: parallelised or not.
            optimizer: over the model's parameters; None loads weights only.

        Returns:
            The `state` that was saved, or None where there is no usable checkpoint.

        Raises:
            ValueError: if it does not fit the model.
        """
        for path in self.usable():
            return load_checkpoint(path, model, optimizer, self.group)
        return None

    def _numbered(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("update_*") if path.is_dir())


def load_checkpoint(
    path: Path | str, model: nn.Module, optimizer: Optimizer | None = None, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Loads one checkpoint folder in place; returns its `state`.

    Raises:
        ValueError: if it cannot be read or does not fit the model.
    """
    path = Path(path)
    saved, metadata = _read_state(path), _read_metadata(path)
    wanted, moments = {}, {}
    weights = model.state_dict()
    held = (key.removeprefix("model.") for key in metadata if key.startswith("model."))
    others = [name for name in held if name not in weights]
    if others:
        raise ValueError(f"checkpoint {path} must hold the model's weights only, got {others[0]} and others")
    for name, tensor in weights.items():
        entry = metadata.get(f"model.{name}")
        if entry is None or entry.size != tensor.shape:
            got = "none" if entry is None else tuple(entry.size)
            raise ValueError(f"checkpoint {path} must hold {name} of shape {tuple(tensor.shape)}, got {got}")
        wanted[f"model.{name}"] = tensor
    if optimizer is not None:
        ours = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter not in ours:
                continue
            prefix = f"optimizer.{name}:"
            moments[parameter] = dict(saved["optimizer"].get(name, {}))
            for key in (key for key in metadata if key.startswith(prefix)):
                entry = metadata[key]
                if entry.size == parameter.shape:
                    tensor = torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                else:
                    # A count of steps, which such optimisers want beside the parameter, and others on the CPU.
                    beside = ours[parameter].get("fused") or ours[parameter].get("capturable")
                    device = parameter.device if beside else "cpu"
                    tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
                wanted[key] = moments[parameter][key.removeprefix(prefix)] = tensor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(wanted, checkpoint_id=path, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise ValueError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error
    restore_routing(model, saved.get("model", {}), f"checkpoint {path}")
    if optimizer is not None:
        optimizer.state.clear()
        optimizer.state.update({parameter: state for parameter, state in moments.items() if state})
        _set_options(model, optimizer, saved["options"])
    return saved["state"]


def export_safetensors(model: nn.Module, path: Path | str) -> None:
    """Writes all weights into one file, which `timm.create_model(..., checkpoint_path=path)` loads; all ranks call it.

    The first rank holds the whole model on its CPU for a moment; the others one parameter.

    Raises:
        OSError: on all ranks, if it cannot be written.
    """
    path = Path(path)
    weights = full_state_dict(model, not dist.is_initialized() or dist.get_rank() == 0)

    def write() -> None:
        partial = path.with_name(f".{path.name}")
        # What the state dict says of the model beside its weights: routing, and what it was made with.
        said = json.dumps(metadata_of(weights), sort_keys=True)
        save_file(weights, partial, metadata={"format": "pt", FILE_KEY: said})
        os.replace(partial, path)

    on_first(write)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, spread as another of its shape; itself where that is whole."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    whole = whole.to(like.to_local().device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Whole weights on the CPU; empty on ranks that do not keep them, which must call it all the same."""
    weights, state = {}, model.state_dict()
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = whole.detach().to("cpu", copy=True).contiguous()
    return with_metadata(weights, metadata_of(state))


def _tensors_and_numbers(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors of model and optimiser by name, and what else the optimiser keeps of a parameter."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}:{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _options(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The options of each parameter's group, as its learning rate: groups differ with the number of ranks."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
        found |= {names[parameter]: options for parameter in group["params"] if parameter in names}
    return found


def _set_options(model: nn.Module, optimizer: Optimizer, saved: dict[str, dict[str, Any]]) -> None:
    """Gives every group the options that its parameters had; a group that mixes options keeps its own."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        found = [saved[names[parameter]] for parameter in group["params"] if names.get(parameter) in saved]
        if found and all(options == found[0] for options in found):
            group.update(found[0])


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        return dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything."""
    try:
        files = json.loads((path / _COMPLETE).read_text())
    except (OSError, ValueError) as error:
        return f"{_COMPLETE} cannot be read ({error})"
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} must have {size} bytes, has {file.stat().st_size}"
        if _crc(file) != crc:
            return f"{name} has changed"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def _sync(path: Path) -> None:
    """Onto the disk, so that a rename never comes before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
