"""What an H200 should need for each op and kernel, from counted work over measured ceilings, beside empty columns.

Written where there is no GPU, so that the first measurement is a comparison.
"""

import importlib
import json
from pathlib import Path

import torch

from benchmarks.harness import bars, work
from benchmarks.harness.cases import LAYERS, Case
from benchmarks.harness.results import RESULTS, environment, heading, write
from benchmarks.harness.session import Session

# The Triton that the measured machines have.
COMPILE_REPORT = RESULTS / "compile_report" / "triton-3.6.json"


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


def layer_kernels(cases: tuple[Case, ...] = LAYERS) -> list[dict]:
    """Least time of every kernel of the layer's experts, bfloat16, and how many of its programs a multiprocessor holds.

    Costs are counted at full capacity; the occupancy is that of the first config in the compile report.
    """
    from vmoe_kernels.experts.triton_moe_mlp import moe_mlp_costs

    resident: dict[str, int] = {}
    for row in occupancy():
        if "/bf16/" in row["name"]:
            resident.setdefault(row["name"].split("/")[0], row["blocks_per_sm"])
    found = []
    for case in cases:
        shape = (case.num_tokens, case.num_selected, case.num_rows, case.num_experts, case.width, case.hidden)
        for kernel, (flops, num_bytes) in moe_mlp_costs(*shape, itemsize=2).items():
            found.append(
                {
                    "kernel": kernel,
                    "case": case.name,
                    "bytes": num_bytes,
                    "flops": flops,
                    "blocks_per_sm": resident.get(kernel),
                    "predicted_us": work.Work(num_bytes, flops).seconds() * 1e6,
                    "measured_us": None,
                }
            )
    return found


def kernel_predictions() -> list[dict]:
    """What the kernels' own files predict (PREDICTED_MICROSECONDS: a name, or a tuple of names and sizes, to us)."""
    from benchmarks.compile.report import triton_modules

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


def write_predicted(folder: Path) -> Path:
    """Writes the bars with an empty measured column, and the predictions beside an empty one."""
    made = environment(torch.device("cpu"))
    results = [bar.result(Session(torch.device("cpu"))) for bar in bars.BARS]
    least, kernels, own, resident = predictions(), layer_kernels(), kernel_predictions(), occupancy()
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
    lines += [
        "",
        "The kernels of the layer's experts, forward and backward, with the programs that a multiprocessor holds:",
        "",
        "| kernel | case | MB | GFLOP | blocks/SM | predicted us | measured us |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each['kernel']} | {each['case']} | {each['bytes'] * 1e-6:.1f} | {each['flops'] * 1e-9:.1f} "
        f"| {each['blocks_per_sm']} | {each['predicted_us']:.1f} | |"
        for each in kernels
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
        "layer_kernels": kernels,
        "kernel_predictions": own,
        "occupancy": resident,
    }
    return write(folder, "report", content, lines)
