"""The study of typefaces: trains what is missing, then writes its tables and figures.

    python -m benchmarks.studies.typefaces [--parts sizes routers ...] [--jobs 2] [--minutes 120]

Every run is a process of one thread and takes at most half an hour on a core of its own. Stopped at any moment, by
--minutes too, it goes on where it was; a finished run is not repeated, nor is one whose results are published with
the same settings, unless another begins with its weights. Fonts: `apt-get install` what
`benchmarks.studies.typefaces.fonts.PACKAGES` lists. Writes benchmarks/results/typefaces/.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.results import RESULTS, command_line, environment, heading, publish
from benchmarks.studies.fashion_mnist import FIGURES
from benchmarks.studies.typefaces import claims, earlier, figures, fonts, pages, report, router_figures, router_report
from benchmarks.studies.typefaces.earlier import finished
from benchmarks.studies.typefaces.measure import SPEED, execute, known_speeds, measured_speeds
from benchmarks.studies.typefaces.runs import PARTS, Run, runs_of
from vmoe_torch.data.typefaces import CHARACTERS

# What a child says that was told to stop.
STOPPED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all runs are finished, 1 when some are left, or failed."""
    parser = command_line(__doc__, RESULTS / "typefaces")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="(all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that, to go on later")
    parser.add_argument("--runs", type=Path, default=Path("runs/typefaces"), help="folder of the runs (%(default)s)")
    parser.add_argument("--fonts", type=Path, default=fonts.INSTALLED, help="where fonts are installed (%(default)s)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures (%(default)s)")
    parser.add_argument("--pages", type=Path, default=FIGURES.parent, help="folder of the pages (%(default)s)")
    parser.add_argument(
        "--speed", action="store_true", help="in the end measure what an image takes; do nothing else on this machine"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        torch.set_num_threads(1)
        run = next(run for run in runs_of() if run.name == options.child)
        return 0 if execute(run, options.runs) is not None else STOPPED
    made = environment(torch.device("cpu"))
    made["threads"] = f"1 for each of {options.jobs} runs at a time"
    every = list(runs_of())
    place = options.runs / "fonts"
    published = earlier.published(options.out / "results.json")
    known = earlier.restore(published, every, options.runs)
    if known:
        print(f"{len(known)} runs are known from {options.out}: {', '.join(known)}", file=sys.stderr)
    runs = earlier.needed(runs_of(options.parts), options.runs)
    if (runs or options.speed) and not (place / CHARACTERS).exists():
        fonts.prepare(place, options.fonts)
    failed = work_through(runs, options.runs, options.jobs, time.monotonic() + 60 * options.minutes)
    found = [result for run in every if (result := earlier.found(run, options.runs)) is not None]
    content = {"environment": made, "runs": found}
    old = published.get("speed", {})
    speed = {
        part: measured_speeds(part, options.runs)
        if options.speed and part in options.parts
        else known_speeds(part, old.get(part, {}))
        for part in SPEED
    }
    if any(speed.values()):
        content["speed"] = {part: each for part, each in speed.items() if each}
    if found:
        for name, canvas in {**figures.drawn(found, options.runs), **router_figures.drawn(content)}.items():
            canvas.savefig(options.figures / f"typefaces_{name}.png", dpi=150)
        publish(options.out, "results", content, page)
        for name, lines in pages.PAGES.items():
            told = options.pages / name
            told.write_text(pages.inserted(told.read_text(encoding="utf-8"), lines(content)), encoding="utf-8")
    left = [run.name for run in runs if not finished(run, options.runs)]
    if left:
        print(f"{len(left)} runs are left: {', '.join(left)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if left else 0


def page(content: dict) -> list[str]:
    """The page of the results, from what their JSON holds."""
    title = heading("Characters in typefaces never seen", content["environment"])
    title += ["That commit wrote these pages. A run's own, where it was noted, stands with it in results.json.", ""]
    return [*title, *claims.table(content["runs"]), *report.sections(content), *router_report.sections(content)]


def work_through(runs: Sequence[Run], folder: Path, jobs: int, deadline: float) -> list[str]:
    """Runs what is not finished, so many at a time; at the deadline they stop with a checkpoint. Returns who failed."""
    waiting = [run for run in runs if not finished(run, folder)]
    working: dict[str, subprocess.Popen] = {}
    failed: list[str] = []
    try:
        while waiting or working:
            for name, process in list(working.items()):
                if process.poll() is not None:
                    del working[name]
                    end = {0: "finished", STOPPED: "stopped"}.get(process.returncode, "failed")
                    print(f"{time.strftime('%H:%M:%S')} {name}: {end}", flush=True)
                    if end == "failed":
                        failed.append(name)
            if time.monotonic() > deadline:
                return failed
            for run in waiting:
                if len(working) == jobs:
                    break
                # A run that begins with another's weights waits for it.
                if run.after is None or finished(run.after, folder):
                    working[run.name] = _start(run, folder)
            waiting = [run for run in waiting if run.name not in working and not finished(run, folder)]
            lost = {*failed, *(run.name for run in waiting if run.after is not None and run.after.name in failed)}
            waiting = [run for run in waiting if run.name not in lost]
            if not working:
                return failed
            time.sleep(1.0)
    finally:
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()
    return failed


def _start(run: Run, folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.studies.typefaces", "--child", run.name, "--runs", str(folder)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{run.name}.log", "a") as log:
        return subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    # Ends its runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
