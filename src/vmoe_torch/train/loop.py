"""The training loop: one process or torchrun's, CPU or CUDA, and exactly resumable after any update."""

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

from vmoe_torch.control import auxiliary_loss
from vmoe_torch.data import EpochSampler, evaluation_loader, training_loader
from vmoe_torch.layers.auxiliary import set_auxiliary_gradient_scale
from vmoe_torch.parallel import (
    ShardedCheckpoints,
    clip_grad_norm,
    full_state_dict,
    load_checkpoint,
    parameter_groups,
)
from vmoe_torch.train.build import build_data, build_loss, build_mixup, build_model, build_transforms, image_mode
from vmoe_torch.train.checkpoint import (
    BEST,
    FORMAT,
    CheckpointFolder,
    load_weights,
    random_states,
    read_checkpoint,
    set_random_states,
    write_atomically,
)
from vmoe_torch.train.config import PRECISIONS, Config
from vmoe_torch.train.determinism import deterministic, seed_everything
from vmoe_torch.train.logs import Logs, check_writable
from vmoe_torch.train.meter import Meter
from vmoe_torch.train.optimizer import build_optimizer, build_schedule
from vmoe_torch.train.processes import Processes, processes
from vmoe_torch.train.sigterm import Sigterm
from vmoe_torch.train.spread import EvenShares, spread_model
from vmoe_torch.train.start import build_starting_model
from vmoe_torch.train.validation import validate


@dataclass
class TrainResult:
    """What a run gives back."""

    model: nn.Module
    # The moving average of the weights, where optim.ema_decay asks for one.
    ema: nn.Module | None
    class_names: tuple[str, ...]
    updates: int
    # False if the run stopped early, by run.max_updates or SIGTERM.
    finished: bool
    best_accuracy: float
    # A row per epoch run here, with the columns of metrics.csv.
    history: list[dict[str, Any]] = field(default_factory=list)


def train(config: Config, resume: bool = False) -> TrainResult:
    """Trains, and leaves config.json, environment.json, metrics.csv, tb/ and checkpoints/ in run.output.

    Everything is checked before the first update: the folder, the data, the model, the checkpoint. SIGTERM ends the run
    after the current update, with a checkpoint.

    Args:
        config: of the run.
        resume: go on from the last checkpoint in run.output, where there is one; the result is bit-equal to that of a
            run that never stopped.

    Returns:
        The model after the last update, and the history.

    Raises:
        ValueError: if a value, a folder, a file or a checkpoint is not what it must be; then nothing has been trained.
        FloatingPointError: if the loss is no longer finite.
    """
    config.check()
    with (
        processes(config.run.device, config.parallel.timeout, config.parallel.enabled) as group,
        deterministic(group.device, config.run.deterministic),
    ):
        run = _Run(config, group, resume)
        with Sigterm() as stop:
            return run.run(stop)


class _Run:
    """The state of a run; `update` counts finished updates."""

    def __init__(self, config: Config, group: Processes, resume: bool):
        self.config = config
        self.group = group
        self.device = device = group.device
        folder = Path(config.run.output)
        if group.is_first:
            check_writable(folder)
        group.wait()
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.run.keep_checkpoints)
        self.spread = config.parallel.enabled
        self.sharded = ShardedCheckpoints(folder / "checkpoints", config.run.keep_checkpoints)
        # Those of a spread run can be resumed without spreading, too.
        found = self.sharded.any()
        if not self.spread and not found:
            self.sharded = None
        last = self.checkpoints.last()
        if (last is not None or found) and not resume:
            raise ValueError(f"run.output must be a new folder, or be resumed; {folder} holds checkpoints already")
        if self.sharded is not None:
            last = next(iter(self.sharded.usable()), None)
        state = None
        if last is not None:
            state = read_checkpoint(last) if self.sharded is None else self.sharded.state(last)
            _check_same_run(config, state["config"])

        data = build_data(config.data, image_mode(config.model))
        self.class_names = data.class_names
        seed_everything(config.run.seed)
        in_parts = self.spread and config.parallel.materialize
        with torch.device("meta") if in_parts else contextlib.nullcontext():
            build = build_starting_model if state is None else build_model
            model = build(config.model, len(data.class_names))
        model = model if in_parts else model.to(device)
        self.model = model = spread_model(model, config, group) if self.spread else model
        optim = config.optim
        self.sampler = EpochSampler(
            len(data.train),
            config.data.batch_size,
            config.run.seed,
            accumulation=optim.accumulation,
            rank=group.rank,
            world_size=group.world_size,
        )
        self.updates_per_epoch = self.sampler.updates_per_epoch
        self.total = config.schedule.total(self.updates_per_epoch)
        train_transform, val_transform = build_transforms(config.data, model)
        pin, workers = device.type == "cuda", config.data.workers
        self.train_batches = training_loader(data.train, train_transform, self.sampler, workers, pin)
        val = EvenShares(data.val, group) if self.spread else data.val
        self.val_count = val.own if self.spread else None
        self.val_batches = evaluation_loader(
            val, val_transform, config.data.eval_batch_size, workers, pin, group.rank, group.world_size
        )
        # A file or transform that cannot work fails here, before any training.
        train_transform(data.train[0][0]), val_transform(data.val[0][0])

        self.mixup = build_mixup(config, len(data.class_names))
        images = config.data.batch_size // (optim.accumulation * group.world_size)
        if isinstance(self.mixup, Mixup) and images % 2:
            raise ValueError(f"data.mixup and data.cutmix need an even number of images per forward, got {images}")
        self.loss = build_loss(config).to(device)
        self.optimizer = build_optimizer(model, optim)
        if self.spread:
            self.optimizer.param_groups = parameter_groups(self.optimizer.param_groups)
        self.schedule = build_schedule(self.optimizer, config.schedule, self.updates_per_epoch)
        self.ema = None if optim.ema_decay is None else ModelEmaV3(model, decay=optim.ema_decay)
        self.dtype = PRECISIONS[config.run.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.update, self.best_accuracy = 0, 0.0
        self.meter = Meter(device)
        # Processes draw different noise.
        seed_everything(config.run.seed, group.rank)
        if state is not None:
            self._restore(state, last)
        self.forward_model = model if self.spread else group.replicate(model)
        if config.run.compile and not self.spread:
            self.forward_model = torch.compile(self.forward_model)

    def run(self, stop: Sigterm) -> TrainResult:
        """All epochs, or those up to run.max_updates."""
        config = self.config
        total = self.total
        last = total if config.run.max_updates is None else min(total, config.run.max_updates)
        logs = Logs(config, self.group.is_first, self.update, total)
        history = []
        try:
            stopped = False
            while self.update < last and not stopped:
                stopped = self._epoch(last, stop, logs)
                if self.update % self.updates_per_epoch == 0 or self.update == total:
                    history.append(self._end_epoch(logs))
                else:
                    self._save()
            if self.sharded is not None:
                self.sharded.wait()
        finally:
            logs.close()
            set_auxiliary_gradient_scale(1.0, self.device)
        return TrainResult(
            self.model,
            None if self.ema is None else self.ema.module,
            self.class_names,
            self.update,
            self.update == total,
            self.best_accuracy,
            history,
        )

    def _epoch(self, last: int, stop: Sigterm, logs: Logs) -> bool:
        """The updates from here to the end of the epoch, or to `last`; returns whether it was told to stop."""
        config, accumulation = self.config, self.config.optim.accumulation
        epoch, first = divmod(self.update, self.updates_per_epoch)
        self.sampler.set_position(epoch, first)
        self.model.train()
        batches = iter(self.train_batches)
        began, images = time.monotonic(), 0
        self.images_per_second = 0.0
        for position in range(first, self.updates_per_epoch):
            norm = self._update_once([next(batches) for _ in range(accumulation)])
            images += config.data.batch_size
            self.update += 1
            logs.advance()
            ends_epoch = position + 1 == self.updates_per_epoch or self.update == self.total
            if self.update % config.run.log_every == 0 or ends_epoch:
                self.images_per_second = images / (time.monotonic() - began)
                self._log(norm, logs)
            every = config.run.checkpoint_every
            if every is not None and self.update % every == 0 and not ends_epoch:
                self._save()
            if self._told_to_stop(stop):
                return True
            if self.update == last:
                break
        return False

    def _update_once(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """One update from its accumulation steps; returns the gradient's norm before clipping, where it clips."""
        if self.schedule is not None:
            self.schedule.step_update(self.update)
        self.optimizer.zero_grad(set_to_none=True)
        steps = len(batches)
        # The gradient that the scaled loss has, which the injected auxiliary losses must have too.
        set_auxiliary_gradient_scale(self.scaler.scale(torch.ones((), device=self.device)) / steps)
        for step, (images, labels) in enumerate(batches):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            inputs, targets = images, labels
            if self.mixup is not None:
                inputs, targets = self.mixup(images, labels)
            last = step + 1 == steps
            # A spread model adds up its gradients' parts, reduced at every step.
            shared = self.forward_model is self.model or self.group.world_size == 1 or last
            with contextlib.nullcontext() if shared else self.forward_model.no_sync():
                with self._autocast():
                    logits = self.forward_model(inputs)
                loss = self.loss(logits.float(), targets)
                # Detached where the layers inject its gradient themselves.
                auxiliary = auxiliary_loss(self.model).to(self.device)
                self.scaler.scale((loss + auxiliary) / steps).backward()
            self.meter.add(logits, labels, loss, auxiliary)
        norm = None
        if self.config.optim.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip = clip_grad_norm if self.spread else nn.utils.clip_grad_norm_
            norm = clip(self.model.parameters(), self.config.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.update + 1)
        return norm

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _log(self, norm: torch.Tensor | None, logs: Logs) -> None:
        """TensorBoard, the bar, and a look at the loss."""
        routing = self.meter.add_routing(self.model)
        means = self.meter.results()
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"loss must stay finite, got {means['loss']} by update {self.update}")
        values = {
            "train/loss": means["loss"],
            "train/auxiliary_loss": means["auxiliary"],
            "train/accuracy": means["accuracy"],
            "train/lr": self._lr(),
            "train/images_per_second": self.images_per_second,
        }
        if norm is not None:
            values["train/gradient_norm"] = norm.item()
        logs.scalars({**values, **routing}, self.update)
        epoch, epochs = (-(-update // self.updates_per_epoch) for update in (self.update, self.total))
        logs.show(
            {
                "epoch": f"{epoch}/{epochs}",
                "loss": f"{means['loss']:.3f}",
                "accuracy": f"{means['accuracy']:.1%}",
                "images/s": f"{self.images_per_second:.0f}",
            }
        )

    def _end_epoch(self, logs: Logs) -> dict[str, Any]:
        """Validates, logs, saves; returns the epoch's row."""
        means = self.meter.results(self.group.sum(self.meter.sums))
        val_loss, val_accuracy = self._validate(self.model)
        ema = (None, None) if self.ema is None else self._validate(self.ema.module)
        accuracy = val_accuracy if ema[1] is None else ema[1]
        best = accuracy > self.best_accuracy
        self.best_accuracy = max(accuracy, self.best_accuracy)
        row = {
            "epoch": -(-self.update // self.updates_per_epoch),
            "update": self.update,
            "lr": self._lr(),
            "train_loss": means["loss"],
            "auxiliary_loss": means["auxiliary"],
            "train_accuracy": means["accuracy"],
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "ema_val_loss": ema[0],
            "ema_val_accuracy": ema[1],
            "dropped": means["dropped"],
            "max_load": means["max_load"],
            "images_per_second": self.images_per_second,
        }
        logs.epoch(row)
        scalars = {"val/loss": val_loss, "val/accuracy": val_accuracy}
        if self.ema is not None:
            scalars |= {"val/ema_loss": ema[0], "val/ema_accuracy": ema[1]}
        logs.scalars(scalars, self.update)
        self.meter = Meter(self.device)
        self._save(best)
        return row

    def _validate(self, model: nn.Module) -> tuple[float, float]:
        return validate(model, self.val_batches, self.group, self.dtype, self.val_count)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _told_to_stop(self, stop: Sigterm) -> bool:
        """Whether any process got SIGTERM; asked rarely where asking makes the processes wait for each other."""
        if self.group.world_size == 1:
            return stop.received
        if self.update % self.config.run.log_every:
            return False
        return bool(self.group.sum(torch.tensor(float(stop.received), device=self.device)) > 0)

    def _save(self, best: bool = False) -> None:
        """A checkpoint of this moment; all processes take part."""
        own = {"random": random_states(), "meter": self.meter.sums.cpu()}
        state = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "class_names": list(self.class_names),
            "update": self.update,
            "best_accuracy": self.best_accuracy,
            "scaler": self.scaler.state_dict(),
            "processes": self.group.gather(own),
        }
        if self.sharded is not None:
            self.sharded.save(self.update, self.model, self.optimizer, state)
            if best:
                weights = full_state_dict(self.model, keep=self.group.is_first)
                if self.group.is_first:
                    whole = {**state, "model": weights, "ema": None, "optimizer": None}
                    write_atomically(self.checkpoints.folder / BEST, whole)
            return
        if self.group.is_first:
            whole = {
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            self.checkpoints.save({**state, **whole}, best)
        self.group.wait()

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        """Goes back to the moment of a checkpoint."""
        if self.sharded is not None:
            load_checkpoint(path, self.model, self.optimizer, self.sharded.group)
        else:
            load_weights(self.model, state["model"])
            if self.ema is not None:
                load_weights(self.ema.module, state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.update, self.best_accuracy = state["update"], state["best_accuracy"]
        everyone = state["processes"]
        if len(everyone) == self.group.world_size:
            own = everyone[self.group.rank]
            set_random_states(own["random"])
            self.meter = Meter(self.device, own["meter"])
        else:
            # Other numbers of processes cannot draw the same noise; the data stays the same.
            seed_everything(self.config.run.seed, self.group.rank, self.update)


def _check_same_run(config: Config, saved: dict[str, Any]) -> None:
    """The checkpoint's configuration computes the same."""
    now = config.to_dict()
    free = {"run": set(now["run"]) - {"seed", "precision"}, "data": {"root", "workers"}}
    free["model"] = {"checkpoint", "pretrained"}
    # Other numbers of processes compute the same.
    free["parallel"] = set(now["parallel"])
    for section, values in now.items():
        for name, value in values.items():
            if name not in free.get(section, ()) and saved[section].get(name) != value:
                raise ValueError(
                    f"{section}.{name} must be that of the run to resume, {saved[section].get(name)!r}, got {value!r}"
                )
