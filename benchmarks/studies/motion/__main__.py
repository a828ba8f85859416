"""The study of moving characters: trains what is missing, then writes its tables, figures and animation.

    python -m benchmarks.studies.motion [--only video frames dense inflated] [--minutes 30] [--fonts FONTS]

A V-MoE of videos, the same V-MoE applied frame by frame, and a dense ViT of videos learn motions whose single frames
tell nothing of their direction. Every run takes some minutes on one core. Stopped at any moment, by --minutes too, it
goes on where its last checkpoint was; a finished run is not repeated. Typefaces are matplotlib's, or those of FONTS,
which holds a folder of fonts for each of train, val and test. Writes benchmarks/results/motion/ and docs/figures.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.results import RESULTS, command_line, environment, publish
from benchmarks.studies.fashion_mnist import FIGURES
from benchmarks.studies.motion import figures, report
from benchmarks.studies.motion.clips import link_fonts
from benchmarks.studies.motion.formula import registered
from benchmarks.studies.motion.measure import RESULT, execute
from benchmarks.studies.motion.runs import FONTS, RUNS


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all runs are finished, 1 when some are left."""
    parser = command_line(__doc__, RESULTS / "motion", threads=1)
    names = tuple(run.name for run in RUNS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="runs to train (all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after that, to go on later")
    parser.add_argument("--runs", type=Path, default=Path("runs/motion"), help="folder of the runs (%(default)s)")
    parser.add_argument("--fonts", type=Path, help="folder with a folder of fonts per split (matplotlib's fonts)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * options.minutes
    prepare_fonts(options.runs, options.fonts)
    for run in RUNS:
        # One that begins with another's weights waits for it.
        ready = run.after is None or (options.runs / run.after / RESULT).exists()
        if run.name in options.only and ready and time.monotonic() < deadline:
            execute(run, options.runs, deadline)
    files = {run.name: options.runs / run.name / RESULT for run in RUNS}
    found = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    if found:
        figures.write(found, options.runs, options.figures)
        made = environment(torch.device("cpu"))
        content = {"environment": made, "runs": found, "registered": registered()}
        publish(options.out, "motion", content, report.markdown)
    left = [name for name, file in files.items() if not file.exists()]
    if left:
        print(f"{len(left)} runs are left: {', '.join(left)}")
    return 1 if left else 0


def prepare_fonts(folder: Path, fonts: Path | None) -> None:
    """Puts the fonts beside the runs: those of a folder, or matplotlib's."""
    folder.mkdir(parents=True, exist_ok=True)
    if fonts is None:
        link_fonts(folder / FONTS)
    elif not (folder / FONTS).exists():
        os.symlink(fonts.resolve(), folder / FONTS)


if __name__ == "__main__":
    sys.exit(main())
