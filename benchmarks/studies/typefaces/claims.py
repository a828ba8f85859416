"""What the paper claims, and what this study finds: a table with a number on both sides.

The paper's numbers are of models a thousand times as large on JFT-300M and ImageNet (arXiv 2106.05974; of upcycling
2212.05055): it is the direction that can be compared.
"""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.studies.typefaces.report import PRIORITY, at_setting, of, reached, together
from benchmarks.studies.typefaces.runs import SIZES, SPARSE_SIZES


def table(found: Sequence[dict]) -> list[str]:
    """The claims for which the runs are finished."""
    rows = [(claim, *row) for claim, shown in CLAIMS.items() if (row := shown(found)) is not None]
    if not rows:
        return []
    lines = ["What the paper claims, and what this study finds (points are of top-1 on typefaces never seen):", ""]
    lines += ["| claim | paper | here | holds |", "| --- " * 4 + "|"]
    lines += [f"| {claim} | {paper} | {here} | {'yes' if holds else 'no'} |" for claim, paper, here, holds in rows]
    note = [
        '"Yes" is for every seed, size, task and capacity that is told. A part of the inference FLOPs: the least at',
        "which any of the V-MoEs, as trained or with less capacity, is as good as the dense ViT of as many steps, by",
        'the first seed; "yes" is 0.6 or less at every size.',
    ]
    return [*lines, "", *note, ""]


def _pairs(found: Sequence[dict], prefix: str) -> dict[str, list[float]]:
    """{size: differences of sparse and dense top-1 in points, by seed} for the sizes that are finished."""
    pairs = {}
    for size in SIZES:
        shared = together(of(found, "sparse", size, f"sparse_{size}"), of(found, "dense", size, f"{prefix}_{size}"))
        if shared:
            pairs[size] = [100 * (a["test"]["all"] - b["test"]["all"]) for a, b in shared]
    return pairs


def _differences(pairs: dict[str, list[float]]) -> tuple[str, bool]:
    text = ", ".join(f"{size} {statistics.mean(values):+.1f}" for size, values in pairs.items())
    return f"{text} points", all(value > 0 for values in pairs.values() for value in values)


def better_at_equal_steps(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """Differences to the dense model of as many updates."""
    pairs = _pairs(found, "dense")
    return ("5-shot ImageNet: V-MoE-H/14 78.21 %, ViT-H/14 76.95 %", *_differences(pairs)) if pairs else None


def better_at_equal_flops(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """Differences to the dense model of as many training FLOPs."""
    pairs = _pairs(found, "dense_flops")
    return ("at all sizes, in a figure", *_differences(pairs)) if pairs else None


def cheaper_inference(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """The least share of a dense model's FLOPs at which some V-MoE is as good, over all sizes and settings."""
    sparse = [run for each in SPARSE_SIZES for run in of(found, "sparse", each, f"sparse_{each}") if run["seed"] == 0]
    told, holds = [], True
    for size in SIZES:
        dense = of(found, "dense", size, f"dense_{size}")
        if not dense or len(sparse) < len(SIZES):
            return None
        costs = [cost for run in sparse if (cost := reached(run, dense[0]["test"]["all"])) is not None]
        share = min(costs) / dense[0]["forward_flops"] if costs else None
        told.append(f"{size} {'not reached' if share is None else f'{share:.2f}'}")
        holds = holds and share is not None and share <= 0.6
    return "as little as half", f"{', '.join(told)} of the dense FLOPs", holds


def transfer(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """In how many few-shot tasks it is ahead."""
    shared = together(*(of(found, kind, "middle", f"{kind}_middle") for kind in ("sparse", "dense")))
    if not shared:
        return None
    kinds = tuple(zip(*shared))
    tasks = dict.fromkeys((row["task"], row["shots"]) for row in kinds[0][0]["fewshot"])
    better = [
        statistics.mean(
            sign * row["accuracy"]
            for sign, runs in zip((1, -1), kinds)
            for run in runs
            for row in run["fewshot"]
            if (row["task"], row["shots"]) == task
        )
        > 0
        for task in tasks
    ]
    here = f"in {sum(better)} of {len(better)} tasks and shots"
    return "78.21 % against 76.95 %, as above", here, all(better)


def priority(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """What BPR gains at little capacity."""
    runs = of(found, "sparse", "middle", "sparse_middle")
    if not runs:
        return None
    gains, trained = {}, runs[0]["settings"][0]["num_selected_experts"]
    for row in runs[0]["settings"]:
        place = row["num_selected_experts"], row["capacity_factor"]
        if row["capacity_factor"] <= 0.5 and row["num_selected_experts"] == trained:
            top1 = {
                order: statistics.mean(each["top1"] for each in at_setting(runs, *place, order))
                for order in (PRIORITY, not PRIORITY)
            }
            gains[row["capacity_factor"]] = 100 * (top1[PRIORITY] - top1[not PRIORITY])
    text = ", ".join(f"C={factor:g} {gain:+.1f}" for factor, gain in gains.items())
    return "clearly, for C of 0.5 and less", f"{text} points", min(gains.values()) > 0


def specialists(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """Mutual information of the expert and the character, first and last layer."""
    runs = of(found, "sparse", "middle", "sparse_middle")
    if not runs:
        return None
    names = list(runs[0]["routing"])
    first, last = (
        statistics.mean(own["bits"] - own["chance"] for own in (run["routing"][name]["character"] for run in runs))
        for name in (names[0], names[-1])
    )
    return (
        "in a figure",
        f"bits of the character above chance: first layer {first:.2f}, last {last:.2f}",
        last > 2 * first,
    )


def upcycled(found: Sequence[dict]) -> tuple[str, str, bool] | None:
    """Differences to the dense model that goes on."""
    shared = together(of(found, "upcycled", "middle", "upcycled"), of(found, "continued", "middle", "continued"))
    if not shared:
        return None
    gains = [100 * (a["test"]["all"] - b["test"]["all"]) for a, b in shared]
    text = ", ".join(f"{gain:+.2f}" for gain in gains)
    return "better, from 10 % of added compute on", f"{text} points, by seed", min(gains) > 0


# What is shown of each: the paper's number, ours, and whether it holds.
CLAIMS: dict[str, Callable[[Sequence[dict]], tuple[str, str, bool] | None]] = {
    "A V-MoE is better than the dense model after as many training steps": better_at_equal_steps,
    "It is better after as many training FLOPs, too": better_at_equal_flops,
    "It reaches the dense model's quality with a part of its inference FLOPs": cheaper_inference,
    "Few-shot transfer is better, too": transfer,
    "With little capacity, BPR is far better than serving patches in their order": priority,
    "The experts of late layers go by the class, those of early layers do not": specialists,
    "A dense model that goes on is better upcycled, at equal added FLOPs": upcycled,
}
