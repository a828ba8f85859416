"""What an H200 should need for each op and kernel, from counted work over measured ceilings, beside empty columns.

Written where there is no GPU, so that the first measurement is a comparison. A quantity has one prediction: what is
bound by copies or products by these, the slots and the noise by latency; the tiles of products are gemms.py's.
"""

from pathlib import Path

import torch

from benchmarks.harness import bars, work
from benchmarks.harness.cases import LAYERS, Case
from benchmarks.harness.results import environment, heading, write
from benchmarks.harness.session import Session

# Launches, MB read and written, and us of assigning slots at T=25,088, E=32, S=1,568, and of what noise adds. A launch
# takes 3 us (5 us each for the two kernels of PyTorch's sort), memory moves 4.3 TB/s and L2 about 8 TB/s. By selection:
# 512 programs in one wave of 4 warps, each with 3 dependent reads (2 us), 32 counts of about 150 cycles (3 us) and
# K + 1 scans (1 us). By sorting: keys, sort, count, scan, place.
LATENCIES = {
    "slots/select/bpr/K1": (1, 9.7, 9.0),
    "slots/select/bpr/K2": (1, 16.2, 11.0),
    "slots/select/vanilla/K1": (1, 3.3, 5.0),
    "slots/select/vanilla/K2": (1, 6.6, 6.0),
    "slots/sort/bpr/K1": (6, 1.7, 28.0),
    "slots/sort/bpr/K2": (6, 2.4, 30.0),
    "slots/sort/vanilla/K1": (3, 0.5, 10.0),
    "slots/sort/vanilla/K2": (3, 0.9, 11.0),
    "router/noise": (0, 0.0, 7.0),
}


def predictions(cases: tuple[Case, ...] = LAYERS) -> list[dict]:
    """Least time of every op, direction and case on an H200, from bytes and FLOPs over its ceilings."""
    found = []
    for case in cases:
        for op, count in work.OPS.items():
            for direction, least in count(case).items():
                copies, products = least.bytes / work.H200_COPY, least.flops / work.H200_MATMUL
                bound, microseconds = "products" if products > copies else "copies", least.seconds() * 1e6
                if op == "slots":
                    # As many programs as fit at once, whichever the case.
                    bound, microseconds = "latency", LATENCIES[f"slots/select/bpr/K{case.num_selected}"][2]
                found.append(
                    {
                        "op": op,
                        "direction": direction,
                        "case": case.name,
                        "bytes": least.bytes,
                        "flops": least.flops,
                        "predicted_us": microseconds,
                        "bound": bound,
                        "measured_us": None,
                    }
                )
    return found


def layer_kernels(cases: tuple[Case, ...] = LAYERS) -> list[dict]:
    """Least time of a layer's kernels beside its experts' products, bfloat16, at full capacity: all are copies."""
    found = []
    for case in cases:
        shape = (case.num_tokens, case.num_selected, case.num_rows, case.num_experts, case.width, case.hidden)
        for kernel, (flops, num_bytes) in work.moe_mlp_costs(*shape, itemsize=2).items():
            if not flops:
                microseconds = work.Work(num_bytes).seconds() * 1e6
                each = {"kernel": kernel, "case": case.name, "bytes": num_bytes, "predicted_us": microseconds}
                found.append({**each, "measured_us": None})
    return found


def latencies() -> list[dict]:
    """Kernels that wait, for launches and for each other."""
    return [
        {"kernel": name, "launches": launches, "megabytes": size, "predicted_us": time, "measured_us": None}
        for name, (launches, size, time) in LATENCIES.items()
    ]


def write_predicted(folder: Path) -> Path:
    """Writes the bars with an empty measured column, and the predictions beside an empty one."""
    made = environment(torch.device("cpu"))
    results = [bar.result(Session(torch.device("cpu"))) for bar in bars.BARS]
    least, kernels, own = predictions(), layer_kernels(), latencies()
    ceiling_text = f"{work.H200_MATMUL * 1e-12:.0f} TFLOP/s in bf16 and {work.H200_COPY * 1e-12:.1f} TB/s"
    lines = [
        *heading("Kernels, predicted: nothing here was measured on a GPU", made),
        "`python -m benchmarks.report` on a GPU fills the measured columns in a file of its own.",
        "",
        *bars.lines(results),
        "",
        f"Predicted is the least time on an H200: the larger of FLOPs and bytes over {ceiling_text}, inputs read once",
        "and outputs written once; launches come on top. Slots wait for latency, launches included. What the tiles of",
        "the experts' products need beyond that, of L2 and of the schedulers, is in pipelines/gemms.md.",
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
        "| kernel of the layer's experts | case | MB | predicted us | measured us |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each['kernel']} | {each['case']} | {each['bytes'] * 1e-6:.1f} | {each['predicted_us']:.1f} | |"
        for each in kernels
    ]
    lines += ["", "| bound by latency | launches | MB | predicted us | measured us |", "| --- " * 5 + "|"]
    lines += [
        f"| {each['kernel']} | {each['launches']} | {each['megabytes']:.1f} | {each['predicted_us']:.1f} | |"
        for each in own
    ]
    content = {
        "environment": made,
        "bars": results,
        "predictions": least,
        "layer_kernels": kernels,
        "kernel_predictions": own,
    }
    return write(folder, "report", content, lines)
