"""What the MoE layer must reach on a CPU, in one table: float32, 16 bits, the router, a whole model, and peers.

    python -m benchmarks.cpu_bars [--parts layer dtypes router models peers] [--seconds 180] [--threads 2]

Peers are measured where they are installed; a line says how that is done. Parts may be measured one by one: those of
former calls stay in the files. Writes benchmarks/results/<machine>/cpu_bars.{json,md}.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.cases import CPU_LAYER
from benchmarks.harness.entries import HEAD, Entry
from benchmarks.harness.results import (
    Row,
    as_dicts,
    command_line,
    environment,
    from_dicts,
    machine_name,
    publish,
    table,
)
from benchmarks.layer import dtypes_on_cpu, on_cpu, peers_on_cpu, router_on_cpu
from benchmarks.models import step_dtypes

CPU = torch.device("cpu")
NAME = "cpu_bars"
Found = tuple[list[Entry], list[Row]]


def layer(seconds: float) -> Found:
    """The layer's own benchmark, in float32."""
    content = on_cpu.run_cpu(CPU_LAYER, seconds)
    bars = [Entry(**{**bar, "what": f"{bar['what']}, float32"}) for bar in content["bars"]]
    return bars, from_dicts(content["rows"])


# What each part measures, what stands over its lines, and its share of the time.
PARTS: dict[str, tuple[Callable[[float], Found], str, float]] = {
    "layer": (layer, "the layer", 0.25),
    "dtypes": (dtypes_on_cpu.run, "the layer in 16 bits", 0.25),
    "router": (router_on_cpu.run, "the router", 0.05),
    "models": (step_dtypes.run, "the whole model", 0.15),
    "peers": (peers_on_cpu.run, "peers", 0.30),
}


def measured(part: str, seconds: float) -> dict:
    """What the JSON holds of a part."""
    started = time.monotonic()
    entries, rows = PARTS[part][0](seconds)
    return {
        "environment": environment(CPU),
        "seconds": time.monotonic() - started,
        "bars": [vars(entry) for entry in entries],
        "rows": as_dicts(rows),
    }


def markdown(content: dict) -> list[str]:
    """The results file."""
    lines = [
        "# The MoE layer's bars on a CPU, and peers",
        "",
        "Ratios of times, taken within a round of interleaved runs: medians over the rounds (20%..80%). What is timed",
        "was checked in the same run. A bar is the most that a ratio may be; what has none stands there for itself.",
        "",
    ]
    parts = [(name, content["parts"][name]) for name in PARTS if name in content["parts"]]
    lines += HEAD
    for name, part in parts:
        lines.append(f"| **{PARTS[name][1]}** | | | |")
        lines += [Entry(**entry).line() for entry in part["bars"]]
    for name, part in parts:
        made = ", ".join(f"{key} {value}" for key, value in part["environment"].items())
        lines += ["", f"## {PARTS[name][1].capitalize()}", "", f"{made}.", "", *table(part["rows"])]
    return lines


def main(arguments: list[str] | None = None) -> Path:
    """Writes the results after every part; returns the path of the Markdown."""
    parser = command_line(__doc__, threads=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--seconds", type=float, default=180.0, help="of timed runs, all parts together (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = options.out / machine_name(CPU)
    known = folder / f"{NAME}.json"
    content = json.loads(known.read_text()) if known.exists() else {"parts": {}}
    for part in options.parts:
        content["parts"][part] = measured(part, PARTS[part][2] * options.seconds)
        path = publish(folder, NAME, content, markdown)
    return path


if __name__ == "__main__":
    main()
