"""What a run is at a moment: all that a checkpoint holds, how it is saved, and how a run goes back to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vmoe_torch.data.names import shown
from vmoe_torch.parallel import ShardedCheckpoints, full_state_dict, load_checkpoint, part_of
from vmoe_torch.parallel.checkpoint import load_optimizer, options_of
from vmoe_torch.train.build import normalisation
from vmoe_torch.train.checkpoint import (
    FORMAT,
    load_weights,
    random_states,
    read_checkpoint,
    set_random_states,
    write_best,
)
from vmoe_torch.train.config import Config
from vmoe_torch.train.determinism import seed_everything
from vmoe_torch.train.optimizer import build_optimizer
from vmoe_torch.train.process_group import Processes
from vmoe_torch.train.record.meter import Meter
from vmoe_torch.weights.sources import BEST
from vmoe_torch.weights.updates import read_beside


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
    """The checkpoints of a run, a folder each, and its best epoch's weights in one file.

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
        self.folder = output / "checkpoints"
        self.updates = ShardedCheckpoints(self.folder, config.run.keep_checkpoints, alone=not config.parallel.enabled)
        if not resume and group.on_first(self.updates.any):
            raise ValueError(f"run.output must be a new folder, or be resumed; {output} holds checkpoints already")
        self.path = next(iter(self.updates.usable(1)), None)
        self.found = None
        if self.path is not None:
            self.found = read_beside(self.path)["state"] if self.path.is_dir() else read_checkpoint(self.path)
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
            average = None if run.ema is None else run.ema.module
            load_checkpoint(self.path, run.model, run.optimizer, self.updates.group, average)
        else:
            self._restore_file(run)
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

    def _restore_file(self, run: RunState) -> None:
        """The model, its average and the optimiser of an earlier version's file, which held them whole."""
        for kind, module in (("model", run.model), ("ema", run.ema and run.ema.module)):
            if module is not None:
                own, whole = module.state_dict(), self.found[kind]
                for name in own.keys() & whole.keys():
                    whole[name] = part_of(whole[name], own[name])
                load_weights(module, whole)
        saved, names = self.found["optimizer"], {parameter: name for name, parameter in run.model.named_parameters()}
        # Groups of parts are split by mesh; this one numbers parameters as the whole model's did.
        order = build_optimizer(run.model, self.config.optim).param_groups
        sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], order)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{self.path} was written by an earlier version, whose groups of parameters for "
                f"{self.config.optim.name} were of {sizes[0]} parameters, not of {sizes[1]}: begin a new run with it "
                "as model.checkpoint"
            )
        parameters = [parameter for group in order for parameter in group["params"]]
        moments, options = {}, {}
        for group in saved["param_groups"]:
            for number in group["params"]:
                parameter = parameters[number]
                options[names[parameter]] = options_of(group)
                moments[names[parameter]] = {
                    key: part_of(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
                    for key, value in saved["state"].get(number, {}).items()
                }
        load_optimizer(run.model, run.optimizer, moments, options)

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
        average = None if run.ema is None else run.ema.module
        # Before the checkpoint, which says that it is there: a run that is killed in between does both again.
        if best:
            weights = full_state_dict(run.model if average is None else average, keep=self.group.is_first)
            self.group.on_first(lambda: self._save_best(run, weights))

        def save() -> None:
            self.updates.save(run.update, run.model, run.optimizer, state, average)

        if self.config.parallel.enabled:
            save()
        else:
            self.group.on_first(save)

    def _save_best(self, run: RunState, weights: dict[str, Tensor]) -> None:
        mean, std = normalisation(self.config.data, run.model)
        about = {
            "config": self.config.to_dict(),
            "class_names": run.class_names,
            "update": run.update,
            "average": run.ema is not None,
            "metric": {"name": "val_accuracy" if run.ema is None else "ema_val_accuracy", "value": run.best_accuracy},
            "normalisation": {"mean": mean, "std": std},
        }
        write_best(self.folder / BEST, weights, about)
        # Of an earlier version.
        (self.folder / "best.pt").unlink(missing_ok=True)

    def wait(self) -> None:
        """Until what is being written is on the disk."""
        self.updates.wait()


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
