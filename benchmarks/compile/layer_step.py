"""A layer's training step, launch by launch, before | after: launches, and what every kernel compiles to and costs.

    python -m benchmarks.compile.layer_step

Writes benchmarks/results/pipelines/layer_step.{json,md}: today's; what was before is kept in the JSON, by `--before
COMMIT`, run on the tree of that commit. bf16 tokens, a float32 router with noise and BPR, T=25,088, D=768, H=3072,
E=32, K=2; no GPU is used. The experts' products are gemms.py's, which counts their traffic too.

Dims: T tokens, D width, E experts.
"""

import argparse
import math
from contextlib import ExitStack
from unittest.mock import patch

import torch

from benchmarks.compile.gemms import COUNTS, ISSUE, OPS, begun, counts
from benchmarks.compile.launches import Launch, record
from benchmarks.compile.report import Compiled, compile_case
from benchmarks.harness import work
from benchmarks.harness.cases import LAYERS
from benchmarks.harness.results import RESULTS, write
from vmoe_torch.layers import MoeMlp, steps

FILE = RESULTS / "pipelines" / "layer_step.json"
CHIPS = (80, 90, 100)
CASE = LAYERS[0]
# Heading of a column to the field of a row.
COLUMNS = {"programs": "programs", **COUNTS}


def launches(chip: int) -> tuple[list[Launch], list[Launch]]:
    """What a layer in training launches of ours, forward and backward."""
    layer = MoeMlp(
        CASE.width,
        CASE.hidden,
        num_experts=CASE.num_experts,
        num_selected_experts=CASE.num_selected,
        capacity_factor=CASE.capacity_factor,
        group_size=CASE.group_images,
        batch_priority=True,
    ).to(torch.bfloat16)
    layer.router.float()
    shape = CASE.images, CASE.tokens_per_image, CASE.width
    # Nothing runs: losses and noise, which are PyTorch's, must only find numbers.
    x = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    with ExitStack() as stack:
        # Trees before assign_rows have no such name.
        stack.enter_context(patch.object(steps, "has_kernels", lambda device: True, create=True))
        found = stack.enter_context(record(chip))
        y = layer(x)
        forward = len(found)
        y.backward(torch.empty_like(y))
    return found[:forward], found[forward:]


def programs(launch: Launch) -> int:
    """Of a launch, in all."""
    return math.prod(launch.grid)


def router_times(launch: Launch, made: Compiled) -> dict[str, float]:
    """Least microseconds of an H200 for one of the router's kernels, by memory and by the schedulers."""
    direction = "forward" if "forward" in launch.name else "backward"
    tokens, experts, width = (launch.constexprs[f"BLOCK_{name}"] for name in "TED")
    of_step = math.ceil(CASE.num_tokens / tokens) * math.ceil(CASE.num_experts / experts)
    of_step *= math.ceil(CASE.width / width)
    rest = programs(launch) * (made.instructions - made.step)
    issued = launch.num_warps * (of_step * made.step + rest)
    least = work.router(CASE)[direction].bytes / work.H200_COPY
    return {"memory": round(1e6 * least, 1), "issue": round(1e6 * issued / ISSUE, 1)}


def measure(chip: int) -> list[dict]:
    """A row for each launch of ours in a step, in order."""
    rows = []
    for direction, found in zip(("forward", "backward"), launches(chip)):
        for launch in found:
            made = compile_case(launch, chip)
            row = {"kernel": launch.name, "direction": direction, "chip": chip, "programs": programs(launch)}
            row |= counts(made)
            # Of the chip that the ceilings are of.
            if chip == 90 and launch.name.startswith(("router_forward", "router_backward")):
                row["bounds_us"] = router_times(launch, made)
            rows.append(row)
    return rows


def _by_kernel(rows: list[dict], chip: int) -> dict[str, dict]:
    """Rows of a chip; the second launch of a kernel has a name of its own."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["chip"] == chip:
            number = sum(name.partition(", again")[0] == row["kernel"] for name in found)
            found[row["kernel"] + ", again" * bool(number)] = row
    return found


def markdown(content: dict) -> list[str]:
    """Launches, the table of all kernels but the products, and the router's times."""
    made = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# A layer's training step, before and after",
        "",
        f"Written by `python -m benchmarks.compile.layer_step` with {made}; before is the tree of",
        f"{content['commit']}. No GPU was used: everything here is recorded, read from compiled code or counted. bf16",
        f"tokens, a float32 router with noise, BPR, {CASE.name}. Registers are per thread; step is the",
        "machine instructions of a warp from one step of a product to the next, then those that are no product; all is",
        "the kernel's. Only kernels that multiply are disassembled; the experts' products are in gemms.md.",
        "",
        "| | forward | backward |",
        "| --- | --- | --- |",
    ]
    for part in ("before", "after"):
        counts = [_launches(content[part], direction) for direction in ("forward", "backward")]
        lines.append(f"| launches of ours, {part} | {counts[0]} | {counts[1]} |")
    lines += ["", f"| kernel | chip | | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 3) + "|"]
    times = []
    for chip in CHIPS:
        before, after = (_by_kernel(content[part], chip) for part in ("before", "after"))
        for name in dict.fromkeys([*before, *after]):
            if name in OPS:
                continue
            for part, rows in (("before", before), ("after", after)):
                row = rows.get(name)
                values = "not launched" + " | " * (len(COLUMNS) - 1)
                if row is not None:
                    values = " | ".join(_value(row, field) for field in COLUMNS.values())
                    if "bounds_us" in row:
                        bounds = row["bounds_us"]
                        each = f"{bounds['memory']} | {bounds['issue']} | {max(bounds.values())}"
                        times.append(f"| {name} | {part} | {each} | |")
                lines.append(f"| {name} | sm_{chip} | {part} | {values} |")
    lines += [
        "",
        f"What an H200 needs at least for the router, in us: its memory at {work.H200_COPY * 1e-12:.1f} TB/s (both",
        "kernels of the backward together), its schedulers at an instruction a cycle. The larger is predicted; nothing",
        "was measured. The least times of the others, which copy or wait, are in predicted/report.md.",
        "",
        "| kernel | | memory | schedulers | predicted | measured |",
        "| --- " * 6 + "|",
        *times,
    ]
    return lines


def _value(row: dict, field: str) -> str:
    # Without products nothing was disassembled.
    return "" if field in ("step", "other", "instructions", "buffers") and not row["instructions"] else str(row[field])


def _launches(rows: list[dict], direction: str) -> int:
    """Launches of a step in one direction, which are the same number on every chip."""
    counts = {sum(row["direction"] == direction and row["chip"] == chip for row in rows) for chip in CHIPS}
    if len(counts) != 1:
        raise ValueError(f"every chip must have as many launches, got {sorted(counts)}")
    return counts.pop()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="keep the rows as those of the commit before")
    options = parser.parse_args(arguments)
    content, part = begun(FILE, options.before)
    content[part] = [row for chip in CHIPS for row in measure(chip)]
    write(FILE.parent, FILE.stem, content, markdown(content))


if __name__ == "__main__":
    main()
