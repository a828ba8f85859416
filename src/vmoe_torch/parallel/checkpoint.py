"""Checkpoints that know no number of ranks: torch.distributed.checkpoint, asynchronous, whole or not at all.

`weights.updates` says what a checkpoint is on disk. It is written under a hidden name and renamed when all ranks are
done.
"""

import io
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vmoe_torch.files import sync
from vmoe_torch.layers.choice import metadata_of, restore_routing, with_metadata
from vmoe_torch.parallel.mesh import group_timeout
from vmoe_torch.parallel.ranks.agreement import on_first
from vmoe_torch.parallel.writing import Writing, writes
from vmoe_torch.weights.safetensors_files import write_safetensors
from vmoe_torch.weights.updates import (
    AVERAGE,
    COMPLETE,
    MODEL,
    OPTIMIZER,
    STATE,
    checksum,
    problem_of,
    read_beside,
    read_entries,
    read_tensors,
    remove,
    updates_in,
)


class ShardedCheckpoints:
    """The last few checkpoints of a run; all ranks must call its methods together.

    With one process and no process group, everything works alike, but that a checkpoint is written when `save` returns.

    Args:
        folder: where they are; made when the first is written.
        keep: how many to keep.
        alone: whether the model is whole in every process, as under DistributedDataParallel: `save` is then for the
            first rank only.
    """

    def __init__(self, folder: Path | str, keep: int, *, alone: bool = False):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.distributed = dist.is_initialized() and not alone
        self.timeout = group_timeout() if self.distributed else None
        # A group of its own: a thread uses it while one writes, beside those of the training, and nobody else does.
        self.group = dist.new_group(backend="gloo", timeout=self.timeout) if self.distributed else None
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.writing: Writing | None = None
        self.damaged: list[Path] = []

    def save(
        self,
        update: int,
        model: nn.Module,
        optimizer: Optimizer,
        state: dict[str, Any],
        average: nn.Module | None = None,
    ) -> None:
        """Copies the tensors and returns; a thread writes them, and completes the checkpoint when all ranks are done.

        Args:
            update: number of the checkpoint.
            model: parallelised or not.
            optimizer: of its parameters.
            state: everything else, equal on all ranks: plain tensors, numbers, strings, and lists and dicts of them.
            average: a model with the moving average of the weights.

        Raises:
            OSError: if the one before could not be written; or this one, where no other process takes part.
        """
        self.wait()
        tensors, saved = _optimizer_state(model, optimizer)
        for kind, module in ((MODEL, model), (AVERAGE, average)):
            if module is not None:
                tensors |= {f"{kind}{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        beside = io.BytesIO()
        if self.first:
            torch.save({"state": state, "model": metadata_of(model.state_dict()), **saved}, beside)
        partial, final = (self.folder / f"{hidden}update_{update:08d}" for hidden in (".", ""))

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Left by a process that was killed while it wrote.
            for left in (*self.folder.glob(".update_*"), *self.folder.glob("*.part")):
                remove(left)
            partial.mkdir()
            (partial / STATE).write_bytes(beside.getvalue())

        def complete() -> None:
            self._complete(partial, final)

        if self.distributed:
            tensors = BlockingAsyncStager().stage(tensors)
            self.writing = Writing(final, self.group)
            self.writing.begin(tensors, partial, prepare, complete)
            return
        with warnings.catch_warnings(), writes(final):
            # That there is one process is what we want to say.
            warnings.simplefilter("ignore", UserWarning)
            try:
                prepare()
                dcp.save(tensors, checkpoint_id=partial, no_dist=True)
                complete()
            except CheckpointException as error:
                # That of this process, which is the only one.
                raise error.failures[0][0] from None
            finally:
                if not (partial / COMPLETE).exists():
                    shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, partial: Path, final: Path) -> None:
        """Lists the files, renames the folder, and removes those beyond `keep` and those found damaged."""
        files = sorted(path for path in partial.iterdir())
        sizes = {path.name: [path.stat().st_size, checksum(path)] for path in files}
        (partial / COMPLETE).write_text(json.dumps(sizes))
        for path in (*files, partial / COMPLETE, partial):
            sync(path)
        self._publish(partial)
        while self.damaged:
            if (damaged := self.damaged.pop()) != final:
                remove(damaged)
        # Later ones, of another try, must not push this one out.
        for old in [path for path in updates_in(self.folder) if path <= final][: -self.keep]:
            remove(old)

    def _publish(self, partial: Path) -> None:
        """Gives a whole checkpoint its name, in place of an earlier one of that update."""
        final = partial.with_name(partial.name[1:])
        remove(final)
        os.rename(partial, final)
        sync(self.folder)

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
        return bool(updates_in(self.folder))

    def usable(self, most: int | None = None) -> list[Path]:
        """Complete and undamaged checkpoints, the newest first; others are named in warnings of the first rank.

        Waits for one that is being written. Only the first rank looks, so that all see the same.

        Args:
            most: how many to look for; None is all.
        """
        self.wait()
        found, skipped = on_first(lambda: self._look(most))
        # Warnings may be errors, and that of one rank.
        for text in skipped if self.first else ():
            warnings.warn(text, stacklevel=2)
        return found

    def _look(self, most: int | None) -> tuple[list[Path], list[str]]:
        """The usable ones, and what to say of the others."""
        found, skipped = [], []
        for path in sorted(self.folder.glob(".update_*")):
            # A process that was killed may have taken away the one before of that update already.
            if path.is_dir() and problem_of(path) is None:
                self._publish(path)
            else:
                skipped.append(f"checkpoint {path} is half-written, skipped")
        for path in reversed(updates_in(self.folder)):
            if len(found) == most:
                break
            problem = problem_of(path)
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
        for path in self.usable(1):
            return load_checkpoint(path, model, optimizer, self.group)
        return None


def load_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
    average: nn.Module | None = None,
) -> dict[str, Any]:
    """Loads one checkpoint folder in place; returns its `state`.

    Args:
        path: the folder.
        model: parallelised or not.
        optimizer: over the model's parameters; None loads weights only.
        group: all ranks, which call this together.
        average: what the moving average of the weights goes into.

    Raises:
        ValueError: if it cannot be read or does not fit the model.
    """
    path = Path(path)
    saved, entries = read_beside(path), read_entries(path)
    wanted, moments = {}, {}
    for kind, module in ((MODEL, model), (AVERAGE, average)):
        if module is None:
            continue
        weights = module.state_dict()
        held = (key.removeprefix(kind) for key in entries if key.startswith(kind))
        others = [name for name in held if name not in weights]
        if others:
            raise ValueError(f"checkpoint {path} must hold the model's weights only, got {others[0]} and others")
        for name, tensor in weights.items():
            entry = entries.get(f"{kind}{name}")
            if entry is None or entry.size != tensor.shape:
                got = "none" if entry is None else tuple(entry.size)
                raise ValueError(f"checkpoint {path} must hold {name} of shape {tuple(tensor.shape)}, got {got}")
            wanted[f"{kind}{name}"] = tensor
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            prefix = f"{OPTIMIZER}{name}:"
            moments[name] = dict(saved["optimizer"].get(name, {}))
            for key in (key for key in entries if key.startswith(prefix)):
                entry = entries[key]
                like = parameter if entry.size == parameter.shape else torch.empty(entry.size)
                wanted[key] = torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
                moments[name][key.removeprefix(prefix)] = wanted[key]
    read_tensors(path, wanted, group=group)
    for module in filter(None, (model, average)):
        restore_routing(module, saved.get("model", {}), f"checkpoint {path}")
    if optimizer is not None:
        load_optimizer(model, optimizer, moments, saved["options"])
    return saved["state"]


def export_safetensors(model: nn.Module, path: Path | str) -> None:
    """Writes all weights into one file, which `timm.create_model(..., checkpoint_path=path)` loads; all ranks call it.

    The first rank holds the whole model on its CPU for a moment; the others one parameter.

    Raises:
        OSError: on all ranks, if it cannot be written.
    """
    weights = full_state_dict(model, not dist.is_initialized() or dist.get_rank() == 0)
    on_first(lambda: write_safetensors(path, weights, {"format": "pt"}))


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


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and by parameter what else is kept of it and the options of its group, as its learning rate:
    groups, and so numbers of parameters, differ with the number of ranks."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    tensors, others, options = {}, {}, {}
    for packed, group in zip(state["param_groups"], optimizer.param_groups):
        shared = options_of(packed)
        for number, parameter in zip(packed["params"], group["params"]):
            if (name := names.get(parameter)) is None:
                continue
            options[name] = shared
            for key, value in state["state"].get(number, {}).items():
                # DCP takes as long for a count of steps as for a matrix.
                if isinstance(value, DTensor) or (isinstance(value, Tensor) and value.dim() > 0):
                    tensors[f"{OPTIMIZER}{name}:{key}"] = value
                else:
                    others.setdefault(name, {})[key] = value
    return tensors, {"optimizer": others, "options": options}


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimiser's group holds beside its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, moments: dict[str, dict[str, Any]], options: dict[str, dict[str, Any]]
) -> None:
    """Gives an optimiser what it kept of each parameter, and every group the options that its parameters had; a group
    that mixes options keeps its own."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {**optimizer.state_dict(), "state": {}}
    for packed, group in zip(state["param_groups"], optimizer.param_groups):
        found = [options[names[parameter]] for parameter in group["params"] if names.get(parameter) in options]
        if found and all(each == found[0] for each in found):
            packed.update(found[0])
        for number, parameter in zip(packed["params"], group["params"]):
            if kept := moments.get(names.get(parameter)):
                state["state"][number] = kept
    optimizer.load_state_dict(state)
