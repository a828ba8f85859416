"""The `vmoe` command. What a user can get wrong ends in one line on stderr and exit code 2."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

# Shells say so of what SIGINT and SIGPIPE end.
INTERRUPTED, PIPE_CLOSED = 130, 141


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    return parsers()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name of a file or a class that a terminal cannot show must not cost the results.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in arguments if not word.startswith("-")), "")
    prefix = f"vmoe {name}".strip()
    try:
        # Loading torch takes seconds, in which a user may think better of it.
        return _run(arguments)
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on (`vmoe eval ... | head`): Python would complain when it flushes.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        text = _told(error)
        if text is None:
            raise
        if os.environ.get("VMOE_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"{prefix}: {text}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    from vmoe_torch.commands.options import check_names, check_options

    whole, commands = parsers()
    check_names(arguments)
    if arguments and arguments[0] in commands:
        # Options and the rest in any order: argparse knows that for one parser, not for one inside another.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
    else:
        options = whole.parse_args(arguments)
    if options.traceback:
        os.environ["VMOE_TRACEBACK"] = "1"
    from vmoe_torch import cores

    check_options(options)
    cores.share(getattr(options, "workers", 0))
    return options.run(options)


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and that of each command."""
    import vmoe_torch
    from vmoe_torch.commands import analyze, budget, convert, doctor, eval, export, fewshot, plan, predict, prune, train

    made = argparse.ArgumentParser(
        prog="vmoe",
        description="Train and use V-MoE, the sparse vision transformer.",
        epilog="VMOE_TRACEBACK=1, or --traceback after a command, shows where an error comes from.",
    )
    made.add_argument("--version", action="version", version=f"vmoe-torch {vmoe_torch.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, eval, fewshot, predict, analyze, budget, prune, export, plan, convert, doctor):
        command.add(commands)
    for name, each in commands.choices.items():
        each.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
        each.set_defaults(command=name)
    return made, commands.choices


def _told(error: Exception) -> str | None:
    """An error in one line, if it is one that a user causes or can do something about; None for a fault of ours."""
    import torch

    from vmoe_torch.extras import EXTRAS, how_to_install
    from vmoe_torch.parallel import RankError

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(("vmoe_torch", "vmoe_kernels")):
        name = (error.name or "").partition(".")[0]
        advice = f": {how_to_install(name)}" if name in EXTRAS else ""
        return f"this needs the package {error.name}, which is not installed{advice}"
    if isinstance(error, ValueError | FloatingPointError | OSError | RankError):
        return text or type(error).__name__
    return None


if __name__ == "__main__":
    sys.exit(main())
