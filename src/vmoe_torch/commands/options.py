"""Values of command-line options that several commands share."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from vmoe_torch.train.rules import Rule

# Who claims slots first, as options call it, to batch_priority.
ORDERS = {"vanilla": False, "bpr": True}


def integers(text: str) -> tuple[int, ...]:
    """Numbers "2,1" as argparse wants them."""
    return _listed(text, int, "whole numbers")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers "1.05,0.5" as argparse wants them."""
    return _listed(text, float, "numbers")


def words(*known: str) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: a list of these words."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.lower().split(","))
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {text!r}")
        return found

    return parse


def _listed(text: str, kind: type, name: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {name} with commas between, got {text!r}") from None


def progress(text: str) -> Callable[[Iterable], Iterable]:
    """Wraps a loader in a bar on a terminal."""
    return lambda batches: tqdm(batches, desc=text, disable=not sys.stderr.isatty())


def writable(path: str | None, name: str = "--out") -> None:
    """Raises ValueError if a file could not be written there: to be asked before the work, not after."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(f"{name} must be a file in a folder that exists, got {path}")


def keep(parser: argparse.ArgumentParser, rule: Rule, *options: str) -> None:
    """Declares a rule for the values of options, or for each where an option takes several.

    Args:
        parser: of the command.
        rule: that they keep.
        options: as they are typed; an error names them all.
    """
    parser.set_defaults(rules=[*(parser.get_default("rules") or []), (options, rule)])


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError if an option breaks a rule that `keep` declared; one that was not given breaks none."""
    for names, rule in getattr(options, "rules", ()):
        values = [getattr(options, name.lstrip("-").replace("-", "_").lower()) for name in names]
        given = [item for value in values for item in (value if isinstance(value, tuple | list) else [value])]
        if not all(item is None or rule.holds(item) for item in given):
            raise ValueError(f"{' and '.join(names)} must be {rule}, got {' and '.join(map(str, values))}")
