"""How a command shares the machine: how its threads wait for each other, and how many there are.

Threads that wait by spinning, as OpenMP's do by default, hold the cores that the threads they wait for need, as soon
as anything else runs: on two cores beside other jobs an update of the demo then takes ten times as long and more
(benchmarks/models/waiting.py). OpenMP reads its setting when it is loaded, with torch, so the package imports this
module first. It acts in processes that are the `vmoe` command or the demo alone: others that import the package are
their owners' to set up.
"""

import math
import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

# What says how threads wait, and how many there are: who has set one of a kind is left alone.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MODULES = ("vmoe_torch.cli", "vmoe_torch.demo")


def is_command(words: Sequence[str]) -> bool:
    """Whether a process is one of ours, started as `vmoe` or by Python's -m.

    Args:
        words: what Python was started with, as `sys.orig_argv`.
    """
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        if word.startswith("-m"):
            return (word[2:] or "".join(rest[:1])) in MODULES
        if word.startswith("-c"):
            return False
        if word in ("-W", "-X"):
            rest = rest[1:]
        elif not word.startswith("-"):
            return Path(word).stem == "vmoe" and Path(word).suffix in ("", ".exe")
    return False


def set_waiting(environ: MutableMapping[str, str]) -> bool:
    """Lets threads sleep while they wait, unless the user has said how; returns whether it did."""
    if any(name in environ for name in WAITING):
        return False
    environ["OMP_WAIT_POLICY"] = "passive"
    return True


def available_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: of its affinity, and within its control groups' quota.

    Args:
        groups: where control groups are mounted.
        own: file that names this process's.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _quota(groups, own))))


def _quota(groups: Path, own: Path) -> float:
    """Cores' worth of time that the control groups of a process give it, and those around them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return math.inf
    least = math.inf
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / controllers
        folder = root / path.strip("/")
        # In a container the path may be one of the host's, which is not there.
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            least = min(least, _quota_of(place))
    return least


def _quota_of(folder: Path) -> float:
    """What one control group gives: of version 2 in cpu.max, of version 1 in two files."""
    try:
        if (folder / "cpu.max").is_file():
            share, period = (folder / "cpu.max").read_text().split()
        else:
            share, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(share) / float(period) if float(share) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        # No such file, or "max".
        return math.inf


def threads_beside(workers: int, available: int) -> int:
    """Threads for a process whose images are loaded by others.

    The first of them needs no core of its own: it waits most of the time, and while threads sleep, one more than there
    are cores costs less than one core less. Of many at least half the cores stay for the model.

    Args:
        workers: processes that load.
        available: cores.
    """
    return max(math.ceil(available / 2), available - max(workers - 1, 0))


def share(workers: int) -> None:
    """Sets the number of torch's threads in a process that is ours, unless the user or torchrun has."""
    import torch

    if OURS and not any(name in os.environ for name in COUNTS):
        torch.set_num_threads(threads_beside(workers, available_cores()))


def told(workers: int) -> str | None:
    """What was chosen and why, in a line; None in a process that is not ours."""
    if not OURS:
        return None
    import torch

    count = torch.get_num_threads()
    who = next((f" ({name} is set)" for name in COUNTS if name in os.environ), "")
    beside = f" beside {workers} that load images" if workers else ""
    policy = next((f"{name}={os.environ[name]}" for name in WAITING if name in os.environ), "OpenMP's default")
    why = ": they sleep while they wait, so other jobs cost little" if CHOSEN else ", as the environment says"
    return f"threads: {count}{who} on {available_cores()} cores{beside}; waiting: {policy}{why}"


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """One line, and the exit code of an interrupt, for who interrupts the seconds in which torch is loaded."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("vmoe: interrupted", file=sys.stderr, flush=True)
    # Nothing has begun that would have to end.
    os._exit(130)


OURS = is_command(sys.orig_argv)
CHOSEN = OURS and set_waiting(os.environ)
if OURS:
    sys.excepthook = _say_interrupted
