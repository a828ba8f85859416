"""The vocabulary of the command line: every option that commands share, with its name, meaning and range."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn
from tqdm import tqdm

from vmoe_torch.control import moe_layers, set_routing
from vmoe_torch.layers.options import CapacityFactor
from vmoe_torch.layers.settings import DROPLESS
from vmoe_torch.train.rules import DEVICE, Rule, count

MODEL_HELP = (
    "run folder or checkpoint file of vmoe train or of timm's train.py, folder of timm's save_for_hf, file with a "
    "state dict (NAME=FILE where nothing else tells the timm model), .npz or PREFIX of a checkpoint of the original, "
    "URL of such a file or PREFIX, or name of a timm model with pretrained weights"
)
DATA_HELP = (
    "folder of class folders (or of splits train, val, valid, validation, test of such), folder of Fashion-MNIST's IDX "
    "files, fashion_mnist for the images that come along, a data set of timm's as torch/cifar10=FOLDER, "
    "typefaces=FOLDER for the characters in a folder of fonts, or video=FOLDER for class folders of videos (FOLDER for "
    "a model that learned from such)"
)
# Who claims slots first, as options call it, to batch_priority.
ORDERS = {"vanilla": False, "bpr": True}
# The options that ask for a routing, as their values are called.
_ROUTING = ("capacity", "k", "order", "mean", "threshold", "group_size")
# What options were called in earlier versions, and what says the same now.
RENAMED = {
    "--batch": "--batch-size",
    "--batch-priority": "--order bpr",
    "--capacity-factor": "--capacity",
    "--checkpoint": "MODEL, the first argument",
    "--model": "MODEL, the first argument",
    "--no-batch-priority": "--order vanilla",
    "--num-selected-experts": "--k",
    "--test-split": "--split",
}


def integers(text: str) -> tuple[int, ...]:
    """Numbers "2,1" as argparse wants them."""
    return _listed(text, int, "whole numbers")


def number(text: str) -> CapacityFactor:
    """A capacity as argparse wants it: a number, or "dropless"."""
    if text.strip() == DROPLESS:
        return DROPLESS
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or {DROPLESS}, got {text!r}") from None


def numbers(text: str) -> tuple[CapacityFactor, ...]:
    """Capacities "1.05,0.5,dropless" as argparse wants them."""
    return _listed(text, number, f"numbers or {DROPLESS}")


def orders(text: str) -> tuple[str, ...]:
    """Words "vanilla,bpr" as argparse wants them."""
    found = tuple(part.strip() for part in text.lower().split(","))
    if not set(found) <= set(ORDERS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(ORDERS)}, got {text!r}")
    return found


def count_or(*words: str) -> Callable[[str], int | str]:
    """A type for argparse: a whole number of at least 1, or one of these words."""

    def parse(text: str) -> int | str:
        if text in words:
            return text
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, or {' or '.join(words)}, got {text!r}")
        return int(text)

    return parse


def _listed(text: str, kind: Callable, name: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"must be {name} with commas between, got {text!r}") from None


def progress(text: str) -> Callable[[Iterable], Iterable]:
    """Wraps a loader in a bar on a terminal."""
    return lambda batches: tqdm(batches, desc=text, disable=not sys.stderr.isatty())


def writable(path: str | None, name: str = "--out") -> None:
    """Raises ValueError if a file could not be written there: to be asked before the work, not after."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(f"{name} must be a file in a folder that exists, got {path}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, and the choice between its last weights and their moving average."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the choice between a model's last weights and their moving average."""
    parser.add_argument(
        "--weights",
        choices=("average", "last"),
        help="a moving average of the weights, or the weights themselves (default: the average where there is one)",
    )


def wants_average(options: argparse.Namespace) -> bool | None:
    """What `open_model` takes for it."""
    return None if options.weights is None else options.weights == "average"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the device that is computed on."""
    text = "cpu, cuda or auto, a GPU where there is one (default: auto)"
    add_option(parser, "--device", DEVICE, default="auto", help=text)


def add_routing(parser: argparse.ArgumentParser, several: bool = False, order: bool = True, **defaults: str) -> None:
    """Adds the routing to use: one setting, or a grid of them.

    Args:
        parser: of the command.
        several: whether each option takes several values, with commas between.
        order: whether there is a choice of the order, and of a threshold for gates.
        **defaults: said of "capacity" and "k"; without, it is what the model is set to.
    """
    kinds = (numbers, integers, orders, numbers, numbers) if several else (number, int, None, float, float)
    words = (
        ("capacity", "C", f"slots per expert, times the balanced load, or {DROPLESS}"),
        ("k", "K", "experts per token"),
        ("order", "ORDER", "who claims slots first: vanilla by position, bpr by priority"),
        ("mean", "M", "experts per token on average, for a model that has thresholds of its training"),
        ("threshold", "T", "gate below which a choice takes no slot"),
    )
    for (name, metavar, text), kind in list(zip(words, kinds))[: 5 if order else 2]:
        parser.add_argument(
            f"--{name}",
            type=kind,
            choices=tuple(ORDERS) if kind is None else None,
            metavar=f"{metavar},{metavar}" if several else metavar,
            help=f"{text} (default: {defaults.get(name, 'as MODEL is set')})",
        )


def route(model: nn.Module, options: argparse.Namespace, **more: object) -> None:
    """Sets the routing that the options of `add_routing` ask for, and more where it is not None.

    Raises:
        ValueError: if a value is off, or the model has no MoE layer.
    """
    order = getattr(options, "order", None)
    changes = {
        "capacity_factor": options.capacity,
        "num_selected_experts": options.k,
        "batch_priority": None if order is None else ORDERS[order],
        "mean_selected_experts": getattr(options, "mean", None),
        "gate_threshold": getattr(options, "threshold", None),
        **more,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        check_sparse(model, options)
        set_routing(model, **changes)


def routing_given(options: argparse.Namespace) -> list[str]:
    """The options that ask for a routing and were given: "--capacity", "--k"."""
    return [f"--{name.replace('_', '-')}" for name in _ROUTING if getattr(options, name, None) is not None]


def check_sparse(model: nn.Module, options: argparse.Namespace, purpose: str = "") -> None:
    """Raises ValueError if the model has no MoE layers, saying what needs them: a purpose, or the routing given."""
    if not moe_layers(model):
        purpose = purpose or f"for {' and '.join(routing_given(options))}"
        raise ValueError(f"MODEL must have MoE layers {purpose}, got a dense one: {options.model}")


def add_data(
    parser: argparse.ArgumentParser, split: str | None = None, several: bool = False, required: bool = True
) -> None:
    """Adds the images to use and how they are read.

    Args:
        parser: of the command.
        split: that is taken by default; None is one to measure on.
        several: whether there may be more than one data set.
        required: whether there must be one.
    """
    action, more = ("append", "; may be repeated") if several else ("store", "")
    parser.add_argument("--data", required=required, action=action, metavar="DATA", help=DATA_HELP + more)
    default = split or "val, valid, validation or test"
    parser.add_argument("--split", default=split, metavar="NAME", help=f"part of the data (default: {default})")
    add_number(parser, "--batch-size", 1, 128, "images per forward")
    add_number(parser, "--workers", 0, 0, "processes that read images")
    text = "images that cannot be read and are left out; more are an error that names them"
    add_number(parser, "--max-broken", 0, 0, text)


def views(text: str) -> tuple[int, int]:
    """Clips and crops "8x3" as argparse wants them."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be CLIPSxCROPS, each at least 1, as 8x3, got {text!r}")
    return int(found[1]), int(found[2])


def add_views(parser: argparse.ArgumentParser) -> None:
    """Adds the views of a video whose probabilities are averaged."""
    text = "clips of each video, evenly spaced, times crops of each, whose probabilities are averaged (default: 1x1)"
    parser.add_argument("--views", type=views, metavar="CLIPSxCROPS", help=text)


def add_sample(parser: argparse.ArgumentParser, images: int) -> None:
    """Adds how many images of the data are taken, and the seed."""
    add_number(parser, "--images", 1, images, "images drawn from the data at most")
    add_number(parser, "--seed", 0, 0, "seed of all that is drawn")


def add_out(parser: argparse.ArgumentParser, text: str = "the results as CSV, or as JSON if it ends in .json") -> None:
    """Adds the file of results."""
    parser.add_argument("--out", metavar="FILE", help=f"write {text}")


def add_number(parser: argparse.ArgumentParser, name: str, low: int, default: int | None, text: str) -> None:
    """Adds an option for a whole number from `low` on; without a default it must be given."""
    shown = "" if default is None else f" (default: {default})"
    fixed = {"type": int, "metavar": "N", "help": text + shown}
    add_option(parser, name, count(low), default=default, required=default is None, **fixed)


def add_option(parser: argparse.ArgumentParser, name: str, rule: Rule, **arguments: object) -> None:
    """Adds an option whose value keeps a rule, which `check_options` asks for."""
    parser.add_argument(name, **arguments)
    parser.set_defaults(rules=[*(parser.get_default("rules") or []), (name, rule)])


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError if an option breaks its rule; one that was not given breaks none."""
    for name, rule in getattr(options, "rules", ()):
        value = getattr(options, name.lstrip("-").replace("-", "_"))
        if value is not None and not rule.holds(value):
            raise ValueError(f"{name} must be {rule}, got {value}")


def check_names(arguments: Iterable[str]) -> None:
    """Raises ValueError for an option that has another name now, and names that."""
    for word in arguments:
        old = word.partition("=")[0]
        if old in RENAMED:
            raise ValueError(f"{old} is now {RENAMED[old]}")
