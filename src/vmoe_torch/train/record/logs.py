"""What a run writes and shows: its folder, the CSV and TensorBoard logs, and the progress bar."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from vmoe_torch import cores
from vmoe_torch.files import write_text
from vmoe_torch.train.config import Config
from vmoe_torch.train.record.alarms import Alarm
from vmoe_torch.train.record.routing import LayerSample, routing_columns, routing_row, routing_scalars
from vmoe_torch.train.record.table import CsvTable, read_table

# Of metrics.csv, a row per epoch.
EPOCH_COLUMNS = (
    "epoch",
    "update",
    "lr",
    "train_loss",
    "auxiliary_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "ema_val_loss",
    "ema_val_accuracy",
    "dropped",
    "max_load",
    "images_per_second",
)
# Of progress.csv, a row per log point: means since the one before, in the first process.
POINT_COLUMNS = ("update", "loss", "auxiliary_loss", "accuracy", "lr", "gradient_norm", "images_per_second")
ALARM_COLUMNS = ("update", "kind", "layer", "message")


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it.

    Raises:
        ValueError: if that fails, naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ValueError(f"run.output must be a folder that can be written, got {folder}: {error.strerror}") from None


def environment() -> dict[str, Any]:
    """Versions, hardware, commit and command, for whoever wants the run again."""
    versions = {}
    for package in ("vmoe-torch", "torch", "timm", "triton", "numpy", "torchvision", "pillow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "waiting": {name: os.environ[name] for name in cores.WAITING if name in os.environ},
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": _commit(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The git commit of this package's source, where it runs from a checkout."""
    here = Path(__file__)
    try:
        tracked = subprocess.run(
            ["git", "-C", here.parent, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=10
        )
        if tracked.returncode != 0:
            return None
        head = subprocess.run(["git", "-C", here.parent, "rev-parse", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.decode().strip() or None


class Logs:
    """The files and the bar of the first process; in the others every method does nothing.

    Args:
        config: the run's.
        enabled: whether this is the process that writes.
        model: whose MoE layers routing.csv is about.
        first_update: update to go on from; what the logs hold beyond it is dropped.
        total_updates: for the bar.
        data: which images the run has, in words, for environment.json.
    """

    def __init__(
        self,
        config: Config,
        enabled: bool,
        model: nn.Module,
        first_update: int,
        total_updates: int,
        data: Sequence[str] = (),
    ):
        self.enabled = enabled
        if not enabled:
            return
        folder = Path(config.run.output)
        write_text("configuration", folder / "config.json", config.to_json() + "\n")
        facts = {**environment(), "data": list(data)}
        write_text("description", folder / "environment.json", json.dumps(facts, indent=2) + "\n")
        self.metrics, self.progress, self.routing_table, self.alarms = (
            CsvTable(folder / f"{name}.csv", columns, first_update)
            for name, columns in (
                ("metrics", EPOCH_COLUMNS),
                ("progress", POINT_COLUMNS),
                ("routing", routing_columns(model)),
                ("alarms", ALARM_COLUMNS),
            )
        )
        self.folder = folder
        self.first_update = first_update
        self.write_summary = None
        if config.run.summary:
            from vmoe_torch.train.record.summary import write_summary

            self.write_summary = write_summary
        self.board = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tb", purge_step=first_update + 1)
        if (line := cores.told(config.data.workers)) is not None:
            print(line, file=sys.stderr)
        self.bar = tqdm(
            total=total_updates,
            initial=first_update,
            disable=not config.run.progress,
            unit="update",
            smoothing=0.1,
            # A log file needs no line every tenth of a second.
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        """One more update is done; the first one, in which much is set up, is left out of the time that is promised."""
        if not self.enabled:
            return
        if self.bar.n > self.first_update:
            self.bar.update()
            return
        self.bar.initial = self.bar.n = self.bar.last_print_n = self.first_update + 1
        self.bar.unpause()
        self.bar.refresh()

    def losses(self) -> list[float]:
        """Those of the log points so far."""
        return [float(row["loss"]) for row in read_table(self.progress.path)] if self.enabled else []

    def point(self, row: dict[str, Any], layers: dict[str, LayerSample]) -> None:
        """A log point: a row of progress.csv, one of routing.csv for each MoE layer, and TensorBoard."""
        if not self.enabled:
            return
        update = row["update"]
        self.progress.add(row)
        self.routing_table.add(*(routing_row(update, name, layer) for name, layer in layers.items()))
        shown = {f"train/{name}": row[name] for name in POINT_COLUMNS[1:] if row[name] is not None}
        self._scalars({**shown, **routing_scalars(layers)}, update)

    def alarm(self, alarm: Alarm, everywhere: bool = False) -> None:
        """A row of alarms.csv, and a line on stderr above the bar, that line from other processes, too, if asked."""
        if self.enabled:
            self.alarms.add(vars(alarm))
        if self.enabled or everywhere:
            text = ": ".join(filter(None, (f"update {alarm.update}", alarm.kind, alarm.layer, alarm.message)))
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def show(self, values: dict[str, str]) -> None:
        """Beside the bar."""
        if self.enabled:
            self.bar.set_postfix(values, refresh=False)

    def epoch(self, row: dict[str, Any]) -> None:
        """A row of metrics.csv, TensorBoard, a line above the bar, and summary.html."""
        if not self.enabled:
            return
        self.metrics.add(row)
        columns = ("val_loss", "val_accuracy", "ema_val_loss", "ema_val_accuracy")
        shown = {f"val/{name.replace('val_', '')}": row[name] for name in columns if row[name] is not None}
        self._scalars(shown, row["update"])
        if not self.bar.disable:
            self.bar.write(_line(row))
        if self.write_summary is not None:
            self.write_summary(self.folder)

    def _scalars(self, values: dict[str, float], update: int) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, update)

    def close(self) -> None:
        """Flushes everything."""
        if self.enabled:
            self.bar.close()
            if self.board is not None:
                self.board.close()


def _line(row: dict[str, float]) -> str:
    parts = [
        f"epoch {row['epoch']}",
        f"loss {row['train_loss']:.4f}",
        f"accuracy {row['train_accuracy']:.1%}",
        f"validation {row['val_accuracy']:.1%}",
    ]
    if row["ema_val_accuracy"] is not None:
        parts.append(f"moving average {row['ema_val_accuracy']:.1%}")
    if row["dropped"] is not None:
        parts.append(f"dropped {row['dropped']:.1%}")
        parts.append(f"max load {row['max_load']:.2f}")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    return "  ".join(parts)
