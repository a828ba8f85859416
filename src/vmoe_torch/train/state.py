"""What a run is at a moment: all that a checkpoint holds, how it is saved, and how a run goes back to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from vmoe_torch.data.names import shown
from vmoe_torch.parallel import ShardedCheckpoints, full_state_dict, load_checkpoint, part_of
from vmoe_torch.train.checkpoint import (
    FORMAT,
    CheckpointFolder,
    load_weights,
    random_states,
    read_checkpoint,
    set_random_states,
)
from vmoe_torch.train.config import Config
from vmoe_torch.train.determinism import seed_everything
from vmoe_torch.train.optimizer import build_optimizer
from vmoe_torch.train.process_group import Processes
from vmoe_torch.train.record.meter import Meter


@dataclass
class RunState:
    """All that changes while a run trains, beside the random generators."""

    model: nn.Module
    """The model that trains."""
    optimizer: torch.optim.Optimizer
    """The optimiser of its parameters."""
    ema: ModelEmaV3 | None
    """The moving average of the weights, where optim.ema_decay asks for one."""
    scaler: torch.amp.GradScaler
    """Scaler of the loss; it does something in float16 only."""
    meter: Meter
    """Sums since the last log point."""
    class_names: tuple[str, ...]
    """Names of the classes, by label."""
    data: dict[str, dict[str, Any]]
    """Of each split: images, classes and a digest of the list of images."""
    update: int = 0
    """Finished updates."""
    best_accuracy: float = 0.0
    """Highest validation accuracy so far, in 0..1."""
    pending: bool = False
    """Whether the epoch that ended with this update is still to be validated."""


class RunCheckpoints:
    """The checkpoints of a run, one file each, or one folder each where the model is spread over processes.

    Args:
        config: of the run.
        group: its processes, which all take part.
        resume: whether there may be checkpoints already.

    Attributes:
        found: what the last checkpoint holds, or None.

    Raises:
        ValueError: if there are checkpoints and `resume` is false, the last cannot be read, or it is of a run that
            computes something else.
    """

    def __init__(self, config: Config, group: Processes, resume: bool):
        self.config = config
        self.group = group
        output = Path(config.run.output)
        folder = output / "checkpoints"
        self.files = CheckpointFolder(folder, config.run.keep_checkpoints)
        self.sharded = ShardedCheckpoints(folder, config.run.keep_checkpoints)
        # One look for all: file systems of several machines do not show everybody the same at once.
        last, any_sharded = group.on_first(lambda: (self.files.last(), self.sharded.any()))
        # Those of a spread run can be resumed without spreading, too.
        if not config.parallel.enabled and not any_sharded:
            self.sharded = None
        if (last is not None or any_sharded) and not resume:
            raise ValueError(f"run.output must be a new folder, or be resumed; {output} holds checkpoints already")
        self.path = None if self.sharded is None else next(iter(self.sharded.usable()), None)
        if self.path is None and last is not None:
            # A run that is spread may go on from one that was not.
            self.path = group.on_first(self.files.usable)
        self.found = None
        if self.path is not None:
            self.found = self.sharded.state(self.path) if self.path.is_dir() else read_checkpoint(self.path)
            _check_same_run(config, self.found["config"])

    def restore(self, run: RunState) -> None:
        """Puts the run, and the random generators, back to the moment of the checkpoint that was found.

        Raises:
            ValueError: if the data's classes or the model are not those of the checkpoint.
        """
        found = self.found
        names = tuple(found["class_names"])
        if names != run.class_names:
            raise ValueError(
                f"data must have the classes of the run to resume, {_shown(names)}, got {_shown(run.class_names)}"
            )
        # Checkpoints of earlier versions do not tell.
        for split, known in found.get("data", {}).items():
            if known["digest"] != run.data[split]["digest"]:
                raise ValueError(
                    f"images of data.{split}_split must be those of the run to resume, {known['images']:,}, got "
                    f"{run.data[split]['images']:,}: some were added, removed or renamed"
                )
        if self.path.is_dir():
            load_checkpoint(self.path, run.model, run.optimizer, self.sharded.group)
        elif self.config.parallel.enabled:
            spread, whole = run.model.state_dict(), found["model"]
            parts = {name: part_of(value, spread[name]) if name in spread else value for name, value in whole.items()}
            load_weights(run.model, parts)
            _load_moments(run, found["optimizer"]["state"], build_optimizer(run.model, self.config.optim))
        else:
            load_weights(run.model, found["model"])
            if run.ema is not None:
                load_weights(run.ema.module, found["ema"])
            run.optimizer.load_state_dict(found["optimizer"])
        run.scaler.load_state_dict(found["scaler"])
        run.update, run.best_accuracy = found["update"], found["best_accuracy"]
        run.pending = found.get("pending", False)
        everyone = found["processes"]
        if len(everyone) == self.group.world_size:
            own = everyone[self.group.rank]
            set_random_states(own["random"])
            run.meter = Meter(self.group.device, own["meter"])
        else:
            # Other numbers of processes cannot draw the same noise; the data stays the same.
            seed_everything(self.config.run.seed, self.group.rank, run.update)

    def save(self, run: RunState, best: bool = False) -> None:
        """A checkpoint of this moment, also as the best if it is; all processes take part."""
        own = {"random": random_states(), "meter": run.meter.sums.cpu()}
        state = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "class_names": list(run.class_names),
            "data": run.data,
            "update": run.update,
            "best_accuracy": run.best_accuracy,
            "pending": run.pending,
            "scaler": run.scaler.state_dict(),
            "processes": self.group.gather(own),
        }
        if self.sharded is not None:
            if best:
                weights = full_state_dict(run.model, keep=self.group.is_first)
                whole = {**state, "model": weights, "ema": None, "optimizer": None}
                self.group.on_first(lambda: self.files.save_best(whole))
            self.sharded.save(run.update, run.model, run.optimizer, state)
            return
        if self.group.is_first:
            whole = {
                "model": run.model.state_dict(),
                "ema": None if run.ema is None else run.ema.module.state_dict(),
                "optimizer": run.optimizer.state_dict(),
            }
            state |= whole
        self.group.on_first(lambda: self.files.save(state, best))

    def wait(self) -> None:
        """Until what is being written is on the disk."""
        if self.sharded is not None:
            self.sharded.wait()


def _load_moments(run: RunState, states: dict[int, dict[str, Any]], order: torch.optim.Optimizer) -> None:
    """The moments that an optimiser over a whole model had, into one over its parts.

    Args:
        run: with the optimiser, whose groups are split by mesh.
        states: by number of the parameter.
        order: one over the same parameters, whose groups are not split, so that it numbers them as that one did.
    """
    parameters = [parameter for group in order.param_groups for parameter in group["params"]]
    run.optimizer.state.clear()
    for number, state in states.items():
        parameter = parameters[number]
        run.optimizer.state[parameter] = {
            key: part_of(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for key, value in state.items()
        }


def _shown(names: tuple[str, ...]) -> str:
    """How many names, and the first of them."""
    return f"{len(names)} ({', '.join(map(shown, names[:3]))}{', ...' if len(names) > 3 else ''})"


def _check_same_run(config: Config, saved: dict[str, Any]) -> None:
    """The checkpoint's configuration computes the same."""
    now, usual = config.to_dict(), Config().to_dict()
    free = {"run": set(now["run"]) - {"seed", "precision"}, "data": {"root", "workers", "prefetch", "max_broken"}}
    free["model"] = {"checkpoint", "pretrained"}
    # Other numbers of processes compute the same.
    free["parallel"] = set(now["parallel"])
    free["alarms"] = set(now["alarms"])
    for section, values in now.items():
        for name, value in values.items():
            # What an earlier version did not know was as it is by default.
            was = saved[section].get(name, usual[section][name])
            if name not in free.get(section, ()) and was != value:
                raise ValueError(f"{section}.{name} must be that of the run to resume, {was!r}, got {value!r}")
