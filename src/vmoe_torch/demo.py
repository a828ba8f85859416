"""`python -m vmoe_torch.demo`: trains a small V-MoE on images that ship with the package, then turns its compute down.

The same weights are evaluated at several capacities, with two experts per token and with one, with the tokens claiming
their slots by position (vanilla) and by priority (BPR). Ends with a table and an HTML report. Two CPU cores and a few
minutes are enough; run again, it goes on where it stopped.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm

from vmoe_torch import cores
from vmoe_torch.analyze import Section, analyze, describe_model
from vmoe_torch.data import open_data
from vmoe_torch.evaluate import format_table
from vmoe_torch.files import write_text
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config, build_transforms, train

CAPACITY_FACTORS = (1.05, 0.5, 0.25, 0.1)
NUM_SELECTED_EXPERTS = (2, 1)

# The recipe of the whole data set, for long enough on the part of it that ships with the package. Loading in the
# process that trains would take a fifth of its time.
CONFIG = load_recipe("fashion_mnist").override("schedule.epochs=12", "data.workers=1")
GROUP_IMAGES = CONFIG.model.kwargs["group_size"]
# Whole groups.
BATCH_IMAGES = CONFIG.data.eval_batch_size


def main(arguments: list[str] | None = None) -> Path:
    """Trains, evaluates, prints the table; returns the path of the report.

    Raises:
        ValueError: if an option is out of its range, or the folder holds another run; before any training.
    """
    options = _parser().parse_args(arguments)
    if options.test_images is not None and options.test_images < 1:
        raise ValueError(f"--test-images must be at least 1, got {options.test_images}")
    out = Path(options.out)
    config = CONFIG.override(f"run.output={out / 'train'}", f"schedule.epochs={options.epochs}")
    if options.max_updates is not None:
        config = config.override(f"run.max_updates={options.max_updates}")
    out.mkdir(parents=True, exist_ok=True)

    result, seconds = timed_train(config, out / "train_seconds.txt")
    if not result.finished and options.max_updates is None:
        raise SystemExit(f"stopped after {result.updates} updates; run again to go on")
    model = result.model
    dataset = open_data("fashion_mnist", split="test", mode="L")
    if options.test_images is not None:
        dataset = Subset(dataset, range(min(options.test_images, len(dataset))))

    analysis = analyze(
        model,
        dataset,
        build_transforms(config.data, model)[1],
        result.class_names,
        capacity_factors=CAPACITY_FACTORS,
        num_selected_experts=NUM_SELECTED_EXPERTS,
        batch_size=BATCH_IMAGES,
        progress=_progress,
    )
    about = _training_section(config, model, analysis.routing, result.updates, seconds, len(dataset))
    files = {"train/: configuration, log, TensorBoard events and checkpoints of the training": "train/"}
    report = analysis.write(out, "One V-MoE, less and less compute", [about], files)

    print("\nThe same weights at every setting (K: experts per token; slots: capacity factor after rounding):\n")
    print(format_table(analysis.evaluations))
    print(f"\nReport: {report.resolve()}")
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m vmoe_torch.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder of the run and its report (%(default)s)")
    parser.add_argument("--epochs", type=int, default=CONFIG.schedule.epochs, help="epochs to train (%(default)s)")
    parser.add_argument("--max-updates", type=int, help="stop the training after so many updates")
    parser.add_argument("--test-images", type=int, help="evaluate on the first so many test images only")
    return parser


def timed_train(config: Config, clock: Path):
    """Trains, or goes on; returns the result and the seconds spent so far, which `clock` keeps between calls."""
    # Empty where the disk was full.
    before = float(clock.read_text() or 0) if clock.exists() else 0.0
    cores.share(config.data.workers)
    start = time.monotonic()
    try:
        result = train(config, resume=True)
    finally:
        seconds = before + time.monotonic() - start
        write_text("clock", clock, f"{seconds:.1f}\n")
    return result, seconds


def _progress(text: str):
    return lambda batches: tqdm(batches, desc=text, disable=not sys.stderr.isatty())


def _training_section(
    config: Config, model: nn.Module, routing: str, updates: int, seconds: float, test_images: int
) -> Section:
    train_images = len(open_data("fashion_mnist", split="train"))
    return Section(
        "What was trained",
        facts={
            "Model": describe_model(model),
            "Routing": f"{routing}, in groups of {GROUP_IMAGES} images; the capacity is rounded up to whole slots only",
            "Data": f"the Fashion-MNIST subset that ships with the package: {train_images:,} training "
            f"images, {test_images:,} test images here",
            "Training": f"{updates:,} updates of {config.data.batch_size} images with {config.optim.name}, "
            f"learning rate {config.optim.lr:g}, {config.schedule.name} schedule over {config.schedule.epochs} epochs",
            "Time": f"{seconds:.0f} s, with the checks after every epoch",
            "Machine": _machine(),
        },
    )


def _machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{device}; Python {platform.python_version()}, PyTorch {torch.__version__}"


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        print("demo: interrupted; run again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
