"""How threads wait, and how many there are: updates of the demo on a quiet machine, and beside a busy process a core.

    python -m benchmarks.models.waiting [--rounds 3] [--updates 10] [--most-seconds 120]

Each measurement is a process of its own, as OpenMP reads its settings when it is loaded: the demo trains on its own
images, loaded by one process, and its updates are timed after the first ones. Rounds take all variants in turn, quiet
and then busy, and a variant that has not made its updates in time counts as that time for each. "default" is torch's,
"passive" what the commands and the demo choose (`vmoe_torch.cores`), "one thread" leaves a core to the loader, and
"short spins" are libgomp's for 1,000 turns before a thread sleeps. Writes
benchmarks/results/<machine>/models_waiting.{json,md}; how busy the machine is otherwise stands in them.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness.protocol import Samples
from benchmarks.harness.results import as_dicts, command_line, environment, heading, machine_name, publish, row, table
from vmoe_torch.cores import COUNTS, WAITING, available_cores

# Name to what the environment says; threads are one per core but where it says otherwise.
VARIANTS = {
    "default": {},
    "short spins": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "passive, one thread": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"},
}
QUIET, BUSY = "quiet", "busy"


def child(updates: int) -> None:
    """What a measured process does: prints the seconds of each update."""
    from benchmarks.models.train_loop import WHOLE, time_waiting
    from vmoe_torch.demo import CONFIG

    config = CONFIG.override("run.progress=false", "run.device=cpu", "run.summary=false", "run.tensorboard=false")
    print(json.dumps(time_waiting(config, updates)[WHOLE].seconds))


def measured(variant: str, updates: int, most_seconds: float) -> tuple[float, ...]:
    """Seconds of updates in a process with a variant's environment."""
    free = {name: value for name, value in os.environ.items() if name not in (*WAITING, *COUNTS)}
    variables = {**free, "OMP_NUM_THREADS": str(available_cores()), **VARIANTS[variant]}
    command = [sys.executable, "-m", "benchmarks.models.waiting", "--child", "--updates", str(updates)]
    try:
        done = subprocess.run(
            command, env=variables, stdout=subprocess.PIPE, text=True, check=True, timeout=most_seconds
        )
    except subprocess.TimeoutExpired:
        return (most_seconds,)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Processes that do nothing but compute, for the length of a `with` block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(rounds: int, updates: int, most_seconds: float) -> dict:
    """Measures; returns what the JSON holds."""
    load = os.getloadavg()[0]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for state, others in ((QUIET, 0), (BUSY, available_cores())):
            with busy_cores(others):
                for variant in VARIANTS:
                    seconds.setdefault((state, variant), []).extend(measured(variant, updates, most_seconds))
    rows = [
        row("demo_update", "both", f"{state}, {available_cores()} cores, 1 loader", variant, Samples(tuple(values)))
        for (state, variant), values in seconds.items()
    ]
    return {
        "environment": environment(torch.device("cpu")),
        "load_before": load,
        "most_seconds": most_seconds,
        "rows": as_dicts(rows),
    }


def markdown(content: dict) -> list[str]:
    """The results file."""
    return [
        *heading("How threads wait", content["environment"]),
        f"The machine's load was {content['load_before']:.2f} before. A variant that was not done in "
        f"{content['most_seconds']:g} s counts as that.",
        "",
        *table(content["rows"]),
    ]


def main(arguments: list[str] | None = None) -> Path | None:
    """Writes the results; returns the path of the Markdown."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--most-seconds", type=float, default=120.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.updates)
        return None
    content = run(options.rounds, options.updates, options.most_seconds)
    return publish(options.out / machine_name(torch.device("cpu")), "models_waiting", content, markdown)


if __name__ == "__main__":
    main()
