"""Measures everything this machine can, checks it against its bars, and writes it down as it goes.

    python -m benchmarks.report [--quick] [--seconds 480]

Writes benchmarks/results/<machine>/report.{json,md} and plots. On a GPU: every op against its opponents, models and
training steps beside dense ones, and how the layer's cost grows. Without one: the same of the layer and models on the
CPU (cpu_report.py), and benchmarks/results/predicted/report.{json,md}, where the measured columns are empty and
predictions stand beside them.
"""

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import bars, work
from benchmarks.cases import LAYERS, Case
from benchmarks.results import RESULTS, as_dicts, environment, heading, machine_name, table, write
from benchmarks.session import Session, first_line

# In this order, each until its share of the time is used up; what one leaves goes to the next. By name: models want
# timm, which a machine with a GPU may lack, and the kernels do not.
SHARES = (
    ("ceilings", 0.05),
    ("bench_slots", 0.10),
    ("bench_gpu_layer", 0.36),
    ("bench_model", 0.12),
    ("bench_expert_mlp", 0.12),
    ("bench_router", 0.05),
    ("bench_dispatch", 0.05),
    ("bench_combine", 0.05),
    ("bench_train_step", 0.05),
    ("bench_scaling", 0.05),
)
QUICK = 2  # cases of LAYERS
# The Triton that the measured machines have.
COMPILE_REPORT = RESULTS / "compile_report" / "triton-3.6.json"


def write_measured(session: Session, folder: Path, complete: bool = False) -> Path:
    """Writes what there is so far."""
    made = environment(session.device)
    results = [bar.result(session) for bar in bars.BARS]
    content = {
        "environment": made,
        "complete": complete,
        "seconds": session.elapsed,
        "bars": results,
        "ceilings": session.ceilings,
        "peak_memory": [
            {"case": case, "variant": variant, "bytes": peak} for (case, variant), peak in session.memory.items()
        ],
        "notes": session.notes,
        "rows": as_dicts(session.rows),
    }
    lines = heading("Kernels, measured", made)
    if not complete:
        lines += ["The run has not ended: this is a part.", ""]
    lines += [
        f"Data is {str(session.dtype).removeprefix('torch.')}, N(0, 1)-like; the L2 is cold; medians of interleaved",
        "runs; every variant passed its check against float64 before it was timed. The worst case counts.",
        "",
        *bars.lines(results),
        "",
        *(f"- {note}" for note in session.notes),
        "",
        *_memory_lines(session),
        *table(session.rows),
    ]
    return write(folder, "report", content, lines)


def write_plots(session: Session, folder: Path) -> None:
    """Draws what was measured; a machine without matplotlib has the numbers alone."""
    try:
        from benchmarks import plots
    except ImportError as error:
        session.note(f"no plots: {first_line(error)}")
    else:
        plots.write_plots(session, session.rows, machine_name(session.device), folder)


def _memory_lines(session: Session) -> list[str]:
    if not session.memory:
        return []
    lines = ["| case | variant | peak memory of a training step |", "| --- | --- | --- |"]
    lines += [f"| {case} | {variant} | {peak / 2**20:.0f} MiB |" for (case, variant), peak in session.memory.items()]
    return [*lines, ""]


def predictions(cases: tuple[Case, ...] = LAYERS) -> list[dict]:
    """Least time of every op, direction and case on an H200, from bytes and FLOPs over its ceilings."""
    found = []
    for case in cases:
        for op, count in work.OPS.items():
            for direction, least in count(case).items():
                copies, products = least.bytes / work.H200_COPY, least.flops / work.H200_MATMUL
                found.append(
                    {
                        "op": op,
                        "direction": direction,
                        "case": case.name,
                        "bytes": least.bytes,
                        "flops": least.flops,
                        "predicted_us": least.seconds() * 1e6,
                        "bound": "products" if products > copies else "copies",
                        "measured_us": None,
                    }
                )
    return found


def kernel_predictions() -> list[dict]:
    """What the kernels' own files predict (PREDICTED_MICROSECONDS: a name, or a tuple of names and sizes, to us)."""
    from benchmarks.compile_report import triton_modules

    found = []
    for module in triton_modules():
        predicted = getattr(importlib.import_module(module), "PREDICTED_MICROSECONDS", {})
        for key, microseconds in predicted.items():
            name = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
            found.append({"module": module, "kernel": name, "predicted_us": microseconds, "measured_us": None})
    return found


def occupancy(capability: int = 90) -> list[dict]:
    """Registers, shared memory and resident blocks of every shipped config, from the compile report."""
    if not COMPILE_REPORT.exists():
        return []
    fields = ("name", "num_warps", "registers", "shared", "blocks_per_sm")
    rows = json.loads(COMPILE_REPORT.read_text())["rows"]
    return [{field: row[field] for field in fields} for row in rows if row["capability"] == capability]


def write_predicted(folder: Path, own: list[dict]) -> Path:
    """Writes the bars with an empty measured column, and the predictions beside an empty one."""
    made = environment(torch.device("cpu"))
    results = [bar.result(Session(torch.device("cpu"))) for bar in bars.BARS]
    least, resident = predictions(), occupancy()
    ceiling_text = f"{work.H200_MATMUL * 1e-12:.0f} TFLOP/s in bf16 and {work.H200_COPY * 1e-12:.1f} TB/s"
    lines = [
        *heading("Kernels, predicted: nothing here was measured on a GPU", made),
        "`python -m benchmarks.report` on a GPU fills the measured columns in a file of its own.",
        "",
        *bars.lines(results),
        "",
        f"Predicted is the least time on an H200: the larger of FLOPs and bytes over {ceiling_text}, inputs read once",
        "and outputs written once; launches come on top.",
        "",
        "| op | direction | case | MB | GFLOP | bound by | predicted us | measured us |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each['op']} | {each['direction']} | {each['case']} | {each['bytes'] * 1e-6:.1f} "
        f"| {each['flops'] * 1e-9:.1f} | {each['bound']} | {each['predicted_us']:.1f} | |"
        for each in least
    ]
    if own:
        lines += ["", "| the kernel files' own predictions | predicted us | measured us |", "| --- | --- | --- |"]
        lines += [f"| {each['kernel']} | {each['predicted_us']:.1f} | |" for each in own]
    if resident:
        lines += [
            "",
            "Occupancy on sm_90, from the compile report:",
            "",
            "| config | warps | registers | shared | blocks/SM | warps/SM |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {each['name']} | {each['num_warps']} | {each['registers']} | {each['shared']} "
            f"| {each['blocks_per_sm']} | {each['blocks_per_sm'] * each['num_warps']} |"
            for each in resident
        ]
    content = {
        "environment": made,
        "bars": results,
        "predictions": least,
        "kernel_predictions": own,
        "occupancy": resident,
    }
    return write(folder, "report", content, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs; on a CPU, predictions alone")
    parser.add_argument("--seconds", type=float, default=480.0, help="of the whole run")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the machine's folder is made")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        path = write_predicted(options.folder / "predicted", kernel_predictions())
        print(f"no GPU: predictions written to {path}")
        if options.quick:
            return 0
        from benchmarks import cpu_report

        return cpu_report.run(options.folder, options.seconds)
    device = torch.device("cuda", torch.cuda.current_device())
    folder = options.folder / machine_name(device)
    session = Session(device, seconds=options.seconds, on_row=lambda session: write_measured(session, folder))
    if options.quick:
        session = replace(session, cases=LAYERS[:QUICK], seconds=min(options.seconds, 180.0), seconds_per_variant=0.1)
    session.run_all(SHARES)
    write_plots(session, folder)
    path = write_measured(session, folder, complete=True)
    print("\n".join(bars.lines([bar.result(session) for bar in bars.BARS])))
    print("\n".join(session.notes))
    print(f"{len(session.rows)} rows in {session.elapsed:.0f} s, written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
