"""The `vmoe` command. What a user can get wrong ends in one line on stderr and exit code 2."""

import argparse
import sys
from collections.abc import Sequence

import vmoe_torch
from vmoe_torch.commands import analyze, budget, convert, eval, export, fewshot, plan, predict, train
from vmoe_torch.parallel import RankError

COMMANDS = (train, eval, fewshot, predict, analyze, budget, export, plan, convert)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    made = argparse.ArgumentParser(prog="vmoe", description="Train and use V-MoE, the sparse vision transformer.")
    made.add_argument("--version", action="version", version=f"vmoe-torch {vmoe_torch.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name of a file or a class that a terminal cannot show must not cost the results.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, FloatingPointError, OSError, RankError) as error:
        text = " ".join(str(error).split())
        print(f"vmoe {options.command}: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
