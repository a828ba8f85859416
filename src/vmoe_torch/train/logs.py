"""What a run writes and shows: its folder, the CSV and TensorBoard logs, and the progress bar."""

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vmoe_torch.train.config import Config

COLUMNS = (
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
        first_update: update to go on from; what the logs hold beyond it is dropped.
        total_updates: for the bar.
    """

    def __init__(self, config: Config, enabled: bool, first_update: int, total_updates: int):
        self.enabled = enabled
        if not enabled:
            return
        folder = Path(config.run.output)
        (folder / "config.json").write_text(config.to_json() + "\n", encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        self.metrics = folder / "metrics.csv"
        rows = [row for row in read_metrics(self.metrics) if int(row["update"]) <= first_update]
        with open(self.metrics, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self.board = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tb", purge_step=first_update + 1)
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
        """One more update is done."""
        if self.enabled:
            self.bar.update()

    def scalars(self, values: dict[str, float], update: int) -> None:
        """To TensorBoard."""
        if self.enabled and self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, update)

    def show(self, values: dict[str, str]) -> None:
        """Beside the bar."""
        if self.enabled:
            self.bar.set_postfix(values, refresh=False)

    def epoch(self, row: dict[str, float]) -> None:
        """A row of metrics.csv, and a line above the bar."""
        if not self.enabled:
            return
        with open(self.metrics, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        if not self.bar.disable:
            self.bar.write(_line(row))

    def close(self) -> None:
        """Flushes everything."""
        if self.enabled:
            self.bar.close()
            if self.board is not None:
                self.board.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
