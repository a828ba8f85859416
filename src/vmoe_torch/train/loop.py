"""The training loop: one process or torchrun's, CPU or CUDA, and exactly resumable after any update.

Over 400 lines: what a run builds, and the order in which it uses it, stand in one place.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from vmoe_torch.data import EpochSampler, evaluation_loader, training_loader
from vmoe_torch.data.loader import read_item
from vmoe_torch.parallel import parameter_groups
from vmoe_torch.train.build import (
    Splits,
    build_data,
    build_loss,
    build_mixup,
    build_model,
    build_transforms,
    check_alike,
    image_mode,
)
from vmoe_torch.train.config import Config
from vmoe_torch.train.determinism import deterministic, seed_everything
from vmoe_torch.train.nonfinite import NonFiniteError, explain, weights_not_finite
from vmoe_torch.train.optimizer import build_optimizer, build_schedule
from vmoe_torch.train.process_group import Processes, processes
from vmoe_torch.train.record.alarms import Alarm, Alarms
from vmoe_torch.train.record.logs import ALARM_COLUMNS, Logs, check_writable
from vmoe_torch.train.record.meter import Meter
from vmoe_torch.train.record.routing import sample_routing
from vmoe_torch.train.record.table import CsvTable
from vmoe_torch.train.sigterm import StopSignals
from vmoe_torch.train.spread import EvenShares, spread_model
from vmoe_torch.train.start import build_starting_model
from vmoe_torch.train.state import RunCheckpoints, RunState
from vmoe_torch.train.step import Update
from vmoe_torch.train.validation import validate


@dataclass
class TrainResult:
    """What a run gives back."""

    model: nn.Module
    """The model after the last update."""
    ema: nn.Module | None
    """The moving average of the weights, where optim.ema_decay asks for one."""
    class_names: tuple[str, ...]
    """Names of the classes, by label."""
    updates: int
    """Finished updates."""
    finished: bool
    """False if the run stopped early, by run.max_updates or SIGTERM."""
    best_accuracy: float
    """Highest validation accuracy so far, in 0..1."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row per epoch run here, with the columns of metrics.csv."""


def train(config: Config, resume: bool = False) -> TrainResult:
    """Trains, and leaves a folder that a person can read in run.output.

    It holds config.json, environment.json, metrics.csv (by epoch), progress.csv and routing.csv (by log point),
    alarms.csv, summary.html, tb/ and checkpoints/.

    Everything is checked before the first update: the folder, the data, the model, the checkpoint. SIGTERM ends the run
    with a checkpoint: after the current update, or after the current batch of a validation, which the resumed run does
    again. Several processes ask each other at log points and at the ends of epochs only, and finish a validation.

    Args:
        config: of the run.
        resume: go on from the last checkpoint in run.output, where there is one; the result is bit-equal to that of a
            run that never stopped.

    Returns:
        The model after the last update, and the history.

    Raises:
        ValueError: if a value, a folder, a file or a checkpoint is not what it must be; then nothing has been trained.
        FloatingPointError: if a loss, a gradient or a weight is not finite; tells the update and the module in which
            that begins. The last checkpoint is from before.
        OSError: if a file cannot be written; earlier checkpoints stay.
    """
    config.check()
    with (
        processes(config.run.device, config.parallel.timeout, config.parallel.enabled) as group,
        deterministic(group.device, config.run.deterministic),
    ):
        try:
            with StopSignals() as stop:
                return TrainingRun(config, group, resume).run(stop)
        except NonFiniteError as error:
            update = error.update
        # Nothing refers to the failed run any more, so there is room for another.
        raise FloatingPointError(_explain_not_finite(config, group, update))


def _explain_not_finite(config: Config, group: Processes, update: int) -> str:
    """What went wrong in an update, found by training up to it again; also goes to alarms.csv and summary.html."""
    message = f"loss must stay finite, got NaN or Inf in update {update}"
    last = RunCheckpoints(config, group, resume=True).path
    if config.alarms.find_not_finite:
        # A compiled model has no modules to watch.
        again = replace(config, run=replace(config.run, compile=False))
        found = TrainingRun(again, group, resume=True).find_not_finite(update)
        reasons = [reason for reason in group.gather(found) if reason is not None]
        message += f": {reasons[0] if reasons else 'it did not repeat when trained again'}"
    if group.is_first:
        # What a full disk says is no news beside this, and would be one process's error.
        with contextlib.suppress(OSError):
            _write_alarm(config, Alarm(update, "not finite", "", message))
    return message + (f"; the last good checkpoint is {last}" if last is not None else "; there is no checkpoint yet")


def _write_alarm(config: Config, alarm: Alarm) -> None:
    """A row of alarms.csv after the end of a run, and summary.html anew."""
    folder = Path(config.run.output)
    CsvTable(folder / "alarms.csv", ALARM_COLUMNS, alarm.update).add(vars(alarm))
    if config.run.summary:
        from vmoe_torch.train.record.summary import write_summary

        write_summary(folder)


def _compared(config: Config) -> dict[str, Any]:
    """What must be the same in all processes, by key; paths and loading may differ between machines."""
    free = {"data.root", "data.workers", "data.prefetch", "model.checkpoint", "run.output", "run.device"}
    free |= {"run.progress", "run.tensorboard", "run.summary"}
    values = {f"{section}.{name}": value for section, part in config.to_dict().items() for name, value in part.items()}
    return {key: value for key, value in values.items() if key not in free}


class TrainingRun:
    """Everything a run needs, built and checked; then its epochs."""

    def __init__(self, config: Config, group: Processes, resume: bool):
        self.config = config
        self.group = group
        group.require_same({"--resume": resume, **_compared(config)})
        group.on_first(lambda: check_writable(Path(config.run.output)))
        self.checkpoints = RunCheckpoints(config, group, resume)
        data = build_data(config.data, image_mode(config.model))
        facts = data.facts()
        check_alike(group.gather(facts))
        self.data = data
        classes = len(data.class_names)
        seed_everything(config.run.seed)
        model = self._build_model(classes)
        if getattr(model, "num_classes", classes) != classes:
            raise ValueError(f"model must have the {classes} classes of the data, got {model.num_classes}")
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
            None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=config.optim.ema_warmup),
            torch.amp.GradScaler(group.device.type, enabled=config.run.precision == "float16"),
            Meter(group.device),
            data.class_names,
            facts,
        )
        # Processes draw different noise.
        seed_everything(config.run.seed, group.rank)
        if self.checkpoints.found is not None:
            self.checkpoints.restore(self.state)
        self.images_per_second = 0.0
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

    def _build_loaders(self, data: Splits, model: nn.Module) -> None:
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
        pin, workers, max_broken = group.device.type == "cuda", config.data.workers, config.data.max_broken
        self.train_batches = training_loader(
            data.train, train_transform, self.sampler, workers, pin, config.data.prefetch, max_broken
        )
        val = EvenShares(data.val, group) if config.parallel.enabled else data.val
        self.val_count = val.own if config.parallel.enabled else None
        self.val_batches = evaluation_loader(
            val, val_transform, config.data.eval_batch_size, workers, pin, group.rank, group.world_size, max_broken
        )
        # A file or transform that cannot work fails here, before any training.
        for split, transform in ((data.train, train_transform), (data.val, val_transform)):
            read_item(split, 0, (config.run.seed,), transform)

    def run(self, stop: StopSignals) -> TrainResult:
        """All epochs, or those up to run.max_updates."""
        config, state, total = self.config, self.state, self.total
        last = total if config.run.max_updates is None else min(total, config.run.max_updates)
        logs = Logs(config, self.group.is_first, state.model, state.update, total, self.data.lines())
        self.alarms = Alarms(config.alarms, logs.losses())
        broken = f"broken {getattr(self.data.train, 'kind', 'image')}"
        for batches in (self.train_batches, self.val_batches):
            batches.warn = lambda message: logs.alarm(Alarm(state.update, broken, "", message), everywhere=True)
        for notice in self.data.notices():
            logs.alarm(Alarm(state.update, "data", "", notice))
        # A quiet run says at its end what it was about.
        if config.run.progress:
            self._tell()
        history = []
        stopped, ended = False, state.pending
        try:
            while True:
                if ended:
                    row = self._end_epoch(logs, stop, stopped)
                    if row is None:
                        break
                    history.append(row)
                if stopped or state.update >= last:
                    break
                before = state.update
                stopped = self._epoch(last, stop, logs)
                # Told to stop before the first update, it ends none.
                ended = state.update > before and self._is_epoch_end()
                if not ended:
                    self._save()
            self.checkpoints.wait()
            if not config.run.progress:
                self._tell()
        except NonFiniteError:
            # All processes raise it together; what they are still writing is from before, and good.
            self.checkpoints.wait()
            raise
        finally:
            logs.close()
        return TrainResult(
            state.model,
            None if state.ema is None else state.ema.module,
            state.class_names,
            state.update,
            state.update == total and not state.pending,
            state.best_accuracy,
            history,
        )

    def _tell(self) -> None:
        """Which images it trains on and is measured on."""
        if self.group.is_first:
            tqdm.write("\n".join(self.data.lines()), file=sys.stderr)

    def _is_epoch_end(self) -> bool:
        return self.state.update % self.updates_per_epoch == 0 or self.state.update == self.total

    def _epoch(self, last: int, stop: StopSignals, logs: Logs) -> bool:
        """The updates from here to the end of the epoch, or to `last`; returns whether it was told to stop."""
        config, state = self.config, self.state
        state.model.train()
        updates = self._updates(stop if self._may_stop_alone() else None)
        began, images = time.monotonic(), 0
        while True:
            batches = next(updates, None)
            if batches is None:
                return True
            norm = self.update_once(batches)
            images += config.data.batch_size
            state.update += 1
            logs.advance()
            ends_epoch = self._is_epoch_end()
            if state.update % config.run.log_every == 0 or ends_epoch:
                self.images_per_second = images / (time.monotonic() - began)
                self._log(norm, logs)
            every = config.run.checkpoint_every
            if every is not None and state.update % every == 0 and not ends_epoch:
                self._save()
            if self._told_to_stop(stop):
                return True
            if ends_epoch or state.update == last:
                return False

    def _updates(self, stop: StopSignals | None = None) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """The batches of each update from here to the end of the epoch, or until a signal comes while one is loaded."""
        self.sampler.set_position(*divmod(self.state.update, self.updates_per_epoch))
        batches = iter(self.train_batches) if stop is None else stop.until_stopped(self.train_batches)
        for first in batches:
            update = [first, *itertools.islice(batches, self.config.optim.accumulation - 1)]
            if len(update) == self.config.optim.accumulation:
                yield update

    def _may_stop_alone(self) -> bool:
        """Whether no other process waits for this one, and what loads the images can be left halfway."""
        return self.group.world_size == 1 and self.config.data.workers > 0

    def _log(self, norm: torch.Tensor | None, logs: Logs) -> None:
        """The files, the bar, and a look at what may have gone wrong."""
        state = self.state
        layers = sample_routing(state.model)
        state.meter.add_routing(layers)
        means, recent = state.meter.results(), state.meter.recent()
        self._require_finite()
        row = {
            "update": state.update,
            "loss": recent["loss"],
            "auxiliary_loss": recent["auxiliary"],
            "accuracy": recent["accuracy"],
            "lr": self._lr(),
            "gradient_norm": None if norm is None else norm.item(),
            "images_per_second": self.images_per_second,
        }
        logs.point(row, layers)
        for alarm in self.alarms.look(state.update, recent["loss"], layers):
            logs.alarm(alarm)
        epoch, epochs = (-(-update // self.updates_per_epoch) for update in (state.update, self.total))
        logs.show(
            {
                "epoch": f"{epoch}/{epochs}",
                "loss": f"{means['loss']:.3f}",
                "accuracy": f"{means['accuracy']:.1%}",
                "images/s": f"{self.images_per_second:.0f}",
            }
        )

    def _require_finite(self, weights: bool = False) -> None:
        """Raises NonFiniteError, in all processes, if an update of any gave NaN or Inf, or the weights hold some."""
        if not self.config.alarms.stop_not_finite:
            return
        state, group = self.state, self.group
        first = self.update_once.watch.first()
        if first is None and weights and weights_not_finite(state.model):
            first = state.update
        if group.sum(torch.tensor(float(first is not None), device=group.device)) > 0:
            raise NonFiniteError(min(update for update in group.gather(first) if update is not None))

    def _save(self, best: bool = False) -> None:
        """A checkpoint, never of weights that are lost."""
        self._require_finite(weights=True)
        self.checkpoints.save(self.state, best)

    def find_not_finite(self, update: int) -> str | None:
        """Trains up to the one before this update, and says what in this one is the first that is not finite."""
        state = self.state
        state.model.train()
        while state.update < update:
            for batches in self._updates():
                if state.update + 1 == update:
                    return explain(self.update_once, state.model, batches, self.group.gather)
                self.update_once(batches)
                state.update += 1
        return None

    def _end_epoch(self, logs: Logs, stop: StopSignals, stopped: bool) -> dict[str, Any] | None:
        """Validates, logs, saves; returns the epoch's row, or None if it was told to stop before."""
        state = self.state
        self._require_finite(weights=True)
        scores = None if stopped else self._validate(state.model, stop)
        ema = scores if state.ema is None or scores is None else self._validate(state.ema.module, stop)
        state.pending = ema is None
        if state.pending:
            self._save()
            return None
        (val_loss, val_accuracy), ema = scores, (None, None) if state.ema is None else ema
        means = state.meter.results(self.group.sum(state.meter.sums))
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
        state.meter = Meter(self.group.device)
        self._save(best)
        return row

    def _validate(self, model: nn.Module, stop: StopSignals) -> tuple[float, float] | None:
        # One process that gave up would leave the others waiting.
        asked = (lambda: stop.received) if self.group.world_size == 1 else (lambda: False)
        batches = stop.until_stopped(self.val_batches) if self._may_stop_alone() else self.val_batches
        return validate(model, batches, self.group, self.update_once.dtype, self.val_count, asked)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def _told_to_stop(self, stop: StopSignals) -> bool:
        """Whether any process got SIGTERM; asked rarely where asking makes the processes wait for each other."""
        if self.group.world_size == 1:
            return stop.received
        if self.state.update % self.config.run.log_every and not self._is_epoch_end():
            return False
        return bool(self.group.sum(torch.tensor(float(stop.received), device=self.group.device)) > 0)
