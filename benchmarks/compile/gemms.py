"""The products of the experts before | after their pipelines were mended: what they compile to, and what that costs.

    python -m benchmarks.compile.gemms [--chips 80 90 ...]

Writes benchmarks/results/pipelines/gemms.{json,md}: today's, on the chips asked for; the others stay as they were.
Half precision (bf16), a step of training at D=768, H=3072; no GPU is used. What was before is kept in the JSON, by
`--before COMMIT`, run on the tree of that commit. Traffic and times are of T=25,088 tokens, E=32, K=2 and capacity
factor 1.05, counted at every row of the buffer.

Dims: R rows per expert.
"""

import argparse
import json
import math
from pathlib import Path

from benchmarks.compile.launches import CALLS, HEADLINE, Launch, record
from benchmarks.compile.report import Compiled, compile_case, versions
from benchmarks.harness import work
from benchmarks.harness.cases import LAYERS, Case
from benchmarks.harness.results import RESULTS, write

FILE = RESULTS / "pipelines" / "gemms.json"
CHIPS = (80, 86, 89, 90, 100, 120)
OPS = ("expert_up", "expert_down", "expert_d_hidden", "expert_d_rows", "expert_d_fc1", "expert_d_fc2")
CASE = LAYERS[0]
# Bytes a second that an H100 or H200 reads from L2, about, and instructions that its schedulers issue: four of 132
# multiprocessors, at the clock at which their tensor cores make the 989 TFLOP/s of the data sheet.
L2_READ, ISSUE = 6e12, 132 * 4 * 1.83e9

# Heading of a column to the field of a row, of any kernel and of a product.
COUNTS = {
    "registers": "registers",
    "blocks/SM": "blocks_per_sm",
    "buffers": "buffers",
    "spills": "local",
    "stack": "stack",
    "shared": "shared",
    "step": "step",
    "no product": "other",
    "all": "instructions",
}
COLUMNS = {
    **{name: field for name, field in COUNTS.items() if name != "all"},
    "per MFLOP": "per_mflop",
    "all": "instructions",
    "L2 MB": "l2_megabytes",
}


def sizes(case: Case, op: str) -> tuple[int, int, int]:
    """Rows, columns and inner length of the product that an op is for each expert."""
    rows, width, hidden = case.rows, case.width, case.hidden
    if op in ("expert_up", "expert_d_hidden"):
        return rows, hidden, width
    if op in ("expert_down", "expert_d_rows"):
        return rows, width, hidden
    return (hidden, width, rows) if op == "expert_d_fc1" else (width, hidden, rows)


def blocks(launch: Launch) -> tuple[int, int, int]:
    """Rows, columns and inner length of a program's tile and step."""
    by_rows, by_weight = ("BLOCK_ROWS", "BLOCK_COLS", "BLOCK_IN"), ("BLOCK_M", "BLOCK_N", "BLOCK_ROWS")
    return tuple(launch.constexprs[name] for name in (by_rows if "BLOCK_IN" in launch.constexprs else by_weight))


def tile(launch: Launch) -> str:
    """How a launch is told from others: "128x256x64, 8 warps, persistent, TMA"."""
    options = {"PERSISTENT": "persistent", "TMA": "TMA"}
    chosen = [word for name, word in options.items() if launch.constexprs.get(name)]
    return ", ".join(["x".join(map(str, blocks(launch))), f"{launch.num_warps} warps", *chosen])


def costs(case: Case, op: str, launch: Launch, step: int, rest: int) -> tuple[int, dict[str, float]]:
    """What the tiles of a product take at least.

    Args:
        case: the layer.
        op: one of OPS.
        launch: with its tile.
        step: instructions of a warp in a step.
        rest: those outside the steps, counted once a tile.

    Returns:
        Bytes that the tiles' operands are read from L2, and microseconds of an H200 by its tensor cores, its memory, L2
        and its schedulers.
    """
    (rows, cols, inner), (block_rows, block_cols, block_inner) = sizes(case, op), blocks(launch)
    tiles = case.num_experts * math.ceil(rows / block_rows) * math.ceil(cols / block_cols)
    l2 = tiles * (block_rows + block_cols) * inner * 2
    layer = (case.num_tokens, case.num_selected, case.num_rows, case.num_experts, case.width, case.hidden)
    flops, least = work.moe_mlp_costs(*layer, itemsize=2)[op]
    issued = tiles * launch.num_warps * (step * math.ceil(inner / block_inner) + rest)
    times = (flops / work.H200_MATMUL, least / work.H200_COPY, l2 / L2_READ, issued / ISSUE)
    bounds = dict(zip(("products", "memory", "L2", "issue"), (1e6 * each for each in times)))
    return l2, {name: round(each, 1) for name, each in bounds.items()}


def counts(made: Compiled) -> dict[str, int]:
    """The fields of COUNTS."""
    fields = [field for field in COUNTS.values() if field != "other"]
    return {**{field: getattr(made, field) for field in fields}, "other": made.step - made.tensor_core}


def measure(chip: int) -> list[dict]:
    """A row for each product of the experts, as the ops launch it on a chip."""
    with record(chip) as launches:
        CALLS[HEADLINE]()
    found = []
    for op in OPS:
        launch = next(each for each in launches if each.name == op)
        made = compile_case(launch, chip)
        l2, bounds = costs(CASE, op, launch, made.step, made.instructions - made.step)
        megaflops = 2e-6 * math.prod(blocks(launch))
        found.append(
            {
                "kernel": op,
                "chip": chip,
                "tile": tile(launch),
                **counts(made),
                "per_mflop": round((made.step - made.tensor_core) * launch.num_warps / megaflops),
                "l2_megabytes": round(l2 * 1e-6),
                # Of the chip that the ceilings are of.
                "bounds_us": bounds if chip == 90 else None,
            }
        )
    return found


def markdown(content: dict) -> list[str]:
    """The table: before and after in turn."""
    made = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# The products of the experts, before and after",
        "",
        f"Written by `python -m benchmarks.compile.gemms` with {made}; before is the tree of",
        f"{content['commit']}. No GPU was used: everything here is read from compiled code or counted. bf16, a step of",
        f"training, {CASE.name}. Registers are per thread; buffers are the tiles",
        "of an operand that shared memory holds at once; step is the machine instructions of a warp from one step of",
        "the sum to the next, then those that are no product, and these of all warps per MFLOP; all is the kernel's.",
        "L2 is what tiles read of their operands.",
        "",
        f"| kernel | chip | | tile | {' | '.join(COLUMNS)} |",
        "| --- " * (len(COLUMNS) + 4) + "|",
    ]
    before = {(row["kernel"], row["chip"]): row for row in content["before"]}
    for row in content["after"]:
        for name, each in (("before", before.get((row["kernel"], row["chip"]))), ("after", row)):
            if each is not None:
                values = " | ".join(str(each[field]) for field in COLUMNS.values())
                lines.append(f"| {row['kernel']} | sm_{row['chip']} | {name} | {each['tile']} | {values} |")
    lines += [
        "",
        f"What an H200 needs at least, in us: its tensor cores at {work.H200_MATMUL * 1e-12:.0f} TFLOP/s, its memory",
        f"at {work.H200_COPY * 1e-12:.1f} TB/s, L2 at {L2_READ * 1e-12:.0f} TB/s, its schedulers at an instruction a",
        "cycle, with what is outside the steps counted once a tile. The largest is predicted; nothing was measured.",
        "",
        "| kernel | | tensor cores | memory | L2 | schedulers | predicted | measured |",
        "| --- " * 8 + "|",
    ]
    for row in content["after"]:
        for name, each in (("before", before.get((row["kernel"], row["chip"]))), ("after", row)):
            if each is not None and each["bounds_us"]:
                bounds = each["bounds_us"]
                values = " | ".join(f"{bounds[part]:.0f}" for part in ("products", "memory", "L2", "issue"))
                lines.append(f"| {row['kernel']} | {name} | {values} | {max(bounds.values()):.0f} | |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", type=int, default=CHIPS, choices=CHIPS)
    parser.add_argument("--before", metavar="COMMIT", help="keep the rows as those of the commit before")
    options = parser.parse_args(arguments)
    content, part = begun(FILE, options.before)
    for chip in options.chips:
        kept = [row for row in content[part] if row["chip"] != chip]
        rows = kept + measure(chip)
        content[part] = sorted(rows, key=lambda row: (OPS.index(row["kernel"]), row["chip"]))
        write(FILE.parent, FILE.stem, content, markdown(content))


def begun(file: Path, commit: str | None) -> tuple[dict, str]:
    """What a comparison's file holds, of today's versions, and the part to measure: that before a commit, or after."""
    content = json.loads(file.read_text()) if file.exists() else {"commit": "", "before": [], "after": []}
    content["versions"] = versions()
    if commit:
        content["commit"] = commit
    return content, "before" if commit else "after"


if __name__ == "__main__":
    main()
