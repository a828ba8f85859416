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

from vmoe_torch.data import EpochSampler, evaluation_loader, training_loader
from vmoe_torch.layers.auxiliary import set_auxiliary_gradient_scale
from vmoe_torch.parallel import parameter_groups
from vmoe_torch.train.build import (
    Data,
    build_data,
    build_loss,
    build_mixup,
    build_model,
    build_transforms,
    image_mode,
)
from vmoe_torch.train.config import Config
from vmoe_torch.train.determinism import deterministic, seed_everything
from vmoe_torch.train.logs import Logs, check_writable
from vmoe_torch.train.meter import Meter
from vmoe_torch.train.optimizer import build_optimizer, build_schedule
from vmoe_torch.train.processes import Processes, processes
from vmoe_torch.train.sigterm import Sigterm
from vmoe_torch.train.spread import EvenShares, spread_model
from vmoe_torch.train.start import build_starting_model
from vmoe_torch.train.state import RunCheckpoints, RunState
from vmoe_torch.train.step import Update
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
    """Everything a run needs, built and checked; then its epochs."""

    def __init__(self, config: Config, group: Processes, resume: bool):
        self.config = config
        self.group = group
        if group.is_first:
            check_writable(Path(config.run.output))
        group.wait()
        self.checkpoints = RunCheckpoints(config, group, resume)
        data = build_data(config.data, image_mode(config.model))
        classes = len(data.class_names)
        seed_everything(config.run.seed)
        model = self._build_model(classes)
        self._build_loaders(data, model)
        self.updates_per_epoch = self.sampler.updates_per_epoch
        self.total = config.schedule.total(self.updates_per_epoch)

        mixup = build_mixup(config, classes)
        images = config.data.batch_size // (config.optim.accumulation * group.world_size)
        if isinstance(mixup, Mixup) and images % 2:
            raise ValueError(f"data.mixup and data.cutmix need an even number of images per forward, got {images}")
        optimizer = build_optimizer(model, config.optim)
        if config.parallel.enabled:
            optimizer.param_groups = parameter_groups(optimizer.param_groups)
        schedule = build_schedule(optimizer, config.schedule, self.updates_per_epoch)
        decay = config.optim.ema_decay
        self.state = RunState(
            model,
            optimizer,
            None if decay is None else ModelEmaV3(model, decay=decay),
            torch.amp.GradScaler(group.device.type, enabled=config.run.precision == "float16"),
            Meter(group.device),
            data.class_names,
        )
        # Processes draw different noise.
        seed_everything(config.run.seed, group.rank)
        if self.checkpoints.found is not None:
            self.checkpoints.restore(self.state)
        self.update_once = Update(config, group, self.state, build_loss(config).to(group.device), mixup, schedule)

    def _build_model(self, num_classes: int) -> nn.Module:
        """The model on its device, spread over processes where the configuration says so."""
        config, group = self.config, self.group
        spread = config.parallel.enabled
        in_parts = spread and config.parallel.materialize
        with torch.device("meta") if in_parts else contextlib.nullcontext():
            build = build_starting_model if self.checkpoints.found is None else build_model
            model = build(config.model, num_classes)
        model = model if in_parts else model.to(group.device)
        return spread_model(model, config, group) if spread else model

    def _build_loaders(self, data: Data, model: nn.Module) -> None:
        """The sampler, and the batches of both splits."""
        config, group = self.config, self.group
        self.sampler = EpochSampler(
            len(data.train),
            config.data.batch_size,
            config.run.seed,
            accumulation=config.optim.accumulation,
            rank=group.rank,
            world_size=group.world_size,
        )
        train_transform, val_transform = build_transforms(config.data, model)
        pin, workers = group.device.type == "cuda", config.data.workers
        self.train_batches = training_loader(data.train, train_transform, self.sampler, workers, pin)
        val = EvenShares(data.val, group) if config.parallel.enabled else data.val
        self.val_count = val.own if config.parallel.enabled else None
        self.val_batches = evaluation_loader(
            val, val_transform, config.data.eval_batch_size, workers, pin, group.rank, group.world_size
        )
        # A file or transform that cannot work fails here, before any training.
        train_transform(data.train[0][0]), val_transform(data.val[0][0])

    def run(self, stop: Sigterm) -> TrainResult:
        """All epochs, or those up to run.max_updates."""
        config, state, total = self.config, self.state, self.total
        last = total if config.run.max_updates is None else min(total, config.run.max_updates)
        logs = Logs(config, self.group.is_first, state.update, total)
        history = []
        try:
            stopped = False
            while state.update < last and not stopped:
                stopped = self._epoch(last, stop, logs)
                if self._is_epoch_end():
                    history.append(self._end_epoch(logs))
                else:
                    self.checkpoints.save(state)
            self.checkpoints.wait()
        finally:
            logs.close()
            set_auxiliary_gradient_scale(1.0, self.group.device)
        return TrainResult(
            state.model,
            None if state.ema is None else state.ema.module,
            state.class_names,
            state.update,
            state.update == total,
            state.best_accuracy,
            history,
        )

    def _is_epoch_end(self) -> bool:
        return self.state.update % self.updates_per_epoch == 0 or self.state.update == self.total

    def _epoch(self, last: int, stop: Sigterm, logs: Logs) -> bool:
        """The updates from here to the end of the epoch, or to `last`; returns whether it was told to stop."""
        config, state = self.config, self.state
        epoch, first = divmod(state.update, self.updates_per_epoch)
        self.sampler.set_position(epoch, first)
        state.model.train()
        batches = iter(self.train_batches)
        began, images = time.monotonic(), 0
        self.images_per_second = 0.0
        while True:
            norm = self.update_once([next(batches) for _ in range(config.optim.accumulation)])
            images += config.data.batch_size
            state.update += 1
            logs.advance()
            ends_epoch = self._is_epoch_end()
            if state.update % config.run.log_every == 0 or ends_epoch:
                self.images_per_second = images / (time.monotonic() - began)
                self._log(norm, logs)
            every = config.run.checkpoint_every
            if every is not None and state.update % every == 0 and not ends_epoch:
                self.checkpoints.save(state)
            if self._told_to_stop(stop):
                return True
            if ends_epoch or state.update == last:
                return False

    def _log(self, norm: torch.Tensor | None, logs: Logs) -> None:
        """TensorBoard, the bar, and a look at the loss."""
        state = self.state
        routing = state.meter.add_routing(state.model)
        means = state.meter.results()
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"loss must stay finite, got {means['loss']} by update {state.update}")
        values = {
            "train/loss": means["loss"],
            "train/auxiliary_loss": means["auxiliary"],
            "train/accuracy": means["accuracy"],
            "train/lr": self._lr(),
            "train/images_per_second": self.images_per_second,
        }
        if norm is not None:
            values["train/gradient_norm"] = norm.item()
        logs.scalars({**values, **routing}, state.update)
        epoch, epochs = (-(-update // self.updates_per_epoch) for update in (state.update, self.total))
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
        state = self.state
        means = state.meter.results(self.group.sum(state.meter.sums))
        val_loss, val_accuracy = self._validate(state.model)
        ema = (None, None) if state.ema is None else self._validate(state.ema.module)
        accuracy = val_accuracy if ema[1] is None else ema[1]
        best = accuracy > state.best_accuracy
        state.best_accuracy = max(accuracy, state.best_accuracy)
        row = {
            "epoch": -(-state.update // self.updates_per_epoch),
            "update": state.update,
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
        if state.ema is not None:
            scalars |= {"val/ema_loss": ema[0], "val/ema_accuracy": ema[1]}
        logs.scalars(scalars, state.update)
        state.meter = Meter(self.group.device)
        self.checkpoints.save(state, best)
        return row

    def _validate(self, model: nn.Module) -> tuple[float, float]:
        return validate(model, self.val_batches, self.group, self.update_once.dtype, self.val_count)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def _told_to_stop(self, stop: Sigterm) -> bool:
        """Whether any process got SIGTERM; asked rarely where asking makes the processes wait for each other."""
        if self.group.world_size == 1:
            return stop.received
        if self.state.update % self.config.run.log_every:
            return False
        return bool(self.group.sum(torch.tensor(float(stop.received), device=self.group.device)) > 0)
