"""Measures everything this machine can, checks it against its bars, and writes it down as it goes.

    python -m benchmarks.report [--quick] [--seconds 480]

Writes benchmarks/results/<machine>/report.{json,md} and plots. On a GPU: every op against its opponents, models and
training steps beside dense ones, and how the layer's cost grows. Without one: the same of the layer and models on the
CPU (cpu_report.py), and benchmarks/results/predicted/report.{json,md}, where the measured columns are empty and
predictions stand beside them.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.compile.predicted import write_predicted
from benchmarks.harness import bars
from benchmarks.harness.cases import LAYERS
from benchmarks.harness.results import command_line, machine_name, report_heading, table, write
from benchmarks.harness.session import Session, first_line

# In this order, each until its share of the time is used up; what one leaves goes to the next. By name: models want
# timm, which a machine with a GPU may lack, and the kernels do not.
SHARES = (
    ("harness.ceilings", 0.05),
    ("ops.slots", 0.10),
    ("layer.on_gpu", 0.36),
    ("models.speed", 0.12),
    ("ops.expert_mlp", 0.12),
    ("ops.router", 0.05),
    ("ops.dispatch", 0.05),
    ("ops.combine", 0.05),
    ("models.train_step", 0.05),
    ("models.scaling", 0.05),
)
QUICK = 2  # cases of LAYERS


def write_measured(session: Session, folder: Path, complete: bool = False) -> Path:
    """Writes what there is so far."""
    content = {
        **session.content([bar.result(session) for bar in bars.BARS], complete),
        "dtype": str(session.dtype).removeprefix("torch."),
        "ceilings": session.ceilings,
        "peak_memory": [
            {"case": case, "variant": variant, "bytes": peak} for (case, variant), peak in session.memory.items()
        ],
    }
    return write(folder, "report", content, markdown(content))


def markdown(content: dict) -> list[str]:
    """The results file."""
    lines = report_heading("Kernels, measured", content)
    lines += [
        f"Data is {content['dtype']}, N(0, 1)-like; the L2 is cold; medians of interleaved",
        "runs; every variant passed its check against float64 before it was timed. The worst case counts.",
        "",
        *bars.lines(content["bars"]),
        "",
        *(f"- {note}" for note in content["notes"]),
        "",
    ]
    if content["peak_memory"]:
        lines += ["| case | variant | peak memory of a training step |", "| --- | --- | --- |"]
        lines += [
            f"| {each['case']} | {each['variant']} | {each['bytes'] / 2**20:.0f} MiB |"
            for each in content["peak_memory"]
        ]
        lines.append("")
    return lines + table(content["rows"])


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs; on a CPU, predictions alone")
    parser.add_argument("--seconds", type=float, default=480.0, help="of the whole run")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        path = write_predicted(options.out / "predicted")
        print(f"no GPU: predictions written to {path}")
        if options.quick:
            return 0
        from benchmarks import cpu_report

        return cpu_report.run(options.out, options.seconds)
    device = torch.device("cuda", torch.cuda.current_device())
    folder = options.out / machine_name(device)
    session = Session(device, seconds=options.seconds, on_row=lambda session: write_measured(session, folder))
    if options.quick:
        session = replace(session, cases=LAYERS[:QUICK], seconds=min(options.seconds, 180.0), seconds_per_variant=0.1)
    session.run_all(SHARES)
    try:
        from benchmarks.harness import plots
    except ImportError as error:  # A machine without matplotlib has the numbers alone.
        session.note(f"no plots: {first_line(error)}")
    else:
        plots.write_plots(session, session.rows, folder)
    path = write_measured(session, folder, complete=True)
    print("\n".join(bars.lines([bar.result(session) for bar in bars.BARS])))
    print("\n".join(session.notes))
    print(f"{len(session.rows)} rows in {session.elapsed:.0f} s, written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
