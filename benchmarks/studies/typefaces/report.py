"""What the study found, in tables."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.studies.typefaces.runs import SEARCH, SIZES, search
from vmoe_torch.report.style import layer_label

# The order of claiming slots that a trained V-MoE is evaluated with.
PRIORITY = True
KINDS = ("dense", "sparse")


def sections(content: Mapping[str, Any]) -> list[str]:
    """All tables that the results allow, as JSON holds them."""
    found = content["runs"]
    lines = [*comparison(found), *wall_clock(content), *every_run(content)]
    return lines + [line for table in (transfer, capacity, budgets, layers, upcycled, chosen) for line in table(found)]


def of(found: Sequence[dict], kind: str, size: str, prefix: str) -> list[dict]:
    """The runs of a kind and a size whose name begins so, by seed."""
    own = (run for run in found if run["kind"] == kind and run["size"] == size and run["name"].startswith(prefix))
    return sorted(own, key=lambda run: run["seed"])


def together(*groups: Sequence[dict]) -> list[tuple[dict, ...]]:
    """For each seed that all of the groups have, its runs."""
    by_seed = [{run["seed"]: run for run in group} for group in groups]
    seeds = sorted(set.intersection(*(set(runs) for runs in by_seed)))
    return [tuple(runs[seed] for runs in by_seed) for seed in seeds]


def offers(run: dict) -> list[tuple[float, float]]:
    """(FLOPs per image, test accuracy) of all that a sparse run's weights can be used as, by FLOPs.

    As trained, with less capacity and BPR, and as `set_budget` chose.
    """
    chosen = [row for row in run["settings"] if row["batch_priority"] == PRIORITY] + list(run["budgets"].values())
    return sorted([(run["forward_flops"], run["test"]["all"]), *((row["flops"], row["top1"]) for row in chosen)])


def equal_flops(run: dict, flops: float) -> float | None:
    """Best test accuracy of a sparse run at so many FLOPs per image, between what it offers; None out of range."""
    points = offers(run)
    best = [(cost, max(top1 for other, top1 in points if other <= cost)) for cost, _ in points]
    for (low, low_top1), (high, high_top1) in itertools.pairwise(best):
        if low <= flops <= high:
            return low_top1 + (high_top1 - low_top1) * (flops - low) / max(high - low, 1e-9)
    return best[-1][1] if flops > best[-1][0] else None


def reached(run: dict, top1: float) -> float | None:
    """The fewest FLOPs per image at which a sparse run is at least as good; None where it never is."""
    return min((flops for flops, other in offers(run) if other >= top1), default=None)


def spread(values: Sequence[float]) -> str:
    """Mean in per cent, and the standard deviation over seeds where there are several."""
    text = f"{100 * statistics.mean(values):.2f}"
    return f"{text} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else text


def comparison(found: Sequence[dict]) -> list[str]:
    """Sparse against dense at equal epochs, equal inference FLOPs and equal training FLOPs."""
    groups = {
        size: together(
            of(found, "sparse", size, f"sparse_{size}"),
            of(found, "dense", size, "dense_flops"),
            of(found, "dense", size, f"dense_{size}"),
        )
        for size in SIZES
    }
    groups["middle, twice as long"] = together(
        of(found, "sparse", "middle", "sparse_twice"), of(found, "dense", "middle", "dense_twice")
    )
    rows = []
    for label, shared in groups.items():
        if not shared:
            continue
        # Those of equal epochs are not asked for where training is long.
        sparse, longer, *dense = zip(*shared)
        if dense:
            at_equal = [equal_flops(run, other["forward_flops"]) for run, other in zip(sparse, *dense)]
            equal_epochs = spread([run["test"]["all"] for run in dense[0]])
            equal_inference = "out of range" if None in at_equal else spread(at_equal)
        else:
            equal_epochs = equal_inference = "-"
        rows.append(
            f"| {label} | {longer[0]['forward_flops'] / 1e6:.1f} | {sparse[0]['forward_flops'] / 1e6:.1f} "
            f"| {spread([run['test']['all'] for run in sparse])} | {equal_epochs} | {equal_inference} "
            f"| {spread([run['test']['all'] for run in longer])} | {len(sparse)} |"
        )
    if not rows:
        return []
    return [
        "Top-1 accuracy on typefaces of families never trained on, in per cent (mean ± standard deviation over seeds).",
        "At equal inference FLOPs the V-MoE costs what the dense one does, by `set_budget` or less capacity and BPR.",
        "",
        "| size | dense MFLOPs | sparse MFLOPs | sparse | dense, equal epochs | sparse, equal inference FLOPs "
        "| dense, equal training FLOPs | seeds |",
        "| --- " * 8 + "|",
        *rows,
        "",
    ]


def wall_clock(content: Mapping[str, Any]) -> list[str]:
    """What an image takes, dense and sparse, beside its FLOPs."""
    speed = content.get("speed", {}).get("sizes")
    if not speed:
        return []
    rows = []
    for size in SIZES:
        cells = [f"{of(content['runs'], kind, size, kind)[0]['forward_flops'] / 1e6:.1f}" for kind in KINDS]
        for what in ("step", "inference"):
            dense, sparse = (1e6 * speed[f"{kind} {size}"][what][0] for kind in KINDS)
            cells += [f"{dense:.0f}", f"{sparse:.0f} ({sparse / dense:.2f}x)"]
        rows.append(f"| {size} | {' | '.join(cells)} |")
    return [
        "Microseconds an image on one thread (128 images at a time; a step is forward, backward and Muon), medians:",
        "",
        "| size | dense MFLOPs | sparse MFLOPs | dense step | sparse step | dense inference | sparse inference |",
        "| --- " * 7 + "|",
        *rows,
        "",
    ]


def every_run(content: Mapping[str, Any]) -> list[str]:
    """What each training cost, and what it came to; minutes are those of a machine that does nothing else."""
    speed, rows = content.get("speed", {}).get("sizes") or {}, []
    for run in content["runs"]:
        if "test" not in run:
            continue
        step = speed.get(f"{run['kind']} {run['size']}", {}).get("step")
        minutes = "" if step is None else f"{run['images'] * step[0] / 60:.1f}"
        rows.append(
            f"| {run['name']} | {run['images']:,} | {run['parameters'] / 1e6:.2f} "
            f"| {run['training_flops'] / 1e12:.1f} | {minutes} "
            f"| {100 * run['validation']['all']:.2f} | {100 * run['test']['all']:.2f} |"
        )
    head = "| run | images | million parameters | training TFLOPs | minutes of one core | validation | test |"
    return ["Every run:", "", head, "| --- " * 7 + "|", *rows, ""] if rows else []


def transfer(found: Sequence[dict]) -> list[str]:
    """Few-shot accuracy on scripts never trained on, at the middle size."""
    shared = together(of(found, "sparse", "middle", "sparse_middle"), of(found, "dense", "middle", "dense_middle"))
    if not shared:
        return []
    kinds = dict(zip(("sparse", "dense"), zip(*shared)))
    tasks = dict.fromkeys((row["task"], row["shots"]) for row in kinds["sparse"][0]["fewshot"])
    lines = ["Few-shot transfer of the middle size, in per cent:", ""]
    lines += ["| characters never trained on | shots | sparse | dense |", "| --- " * 4 + "|"]
    for task, shots in tasks:
        cells = [
            spread(
                [
                    statistics.mean(r["accuracy"] for r in run["fewshot"] if (r["task"], r["shots"]) == (task, shots))
                    for run in runs
                ]
            )
            for runs in kinds.values()
        ]
        lines.append(f"| {task} | {shots} | {' | '.join(cells)} |")
    return [*lines, ""]


def capacity(found: Sequence[dict]) -> list[str]:
    """The middle size's accuracy with less and less capacity."""
    sparse = of(found, "sparse", "middle", "sparse_middle")
    dense = of(found, "dense", "middle", "dense")
    if not sparse or not dense:
        return []
    flops = dense[0]["forward_flops"]
    lines = ["The middle V-MoE with less capacity, its weights as trained (one figure: of the first seed alone):", ""]
    lines += ["| K | capacity | of the dense FLOPs | vanilla | BPR |", "| --- " * 5 + "|"]
    places = dict.fromkeys((row["num_selected_experts"], row["capacity_factor"]) for row in sparse[0]["settings"])
    for selected, factor in places:
        by_order = [at_setting(sparse, selected, factor, order) for order in (False, True)]
        cells = [spread([row["top1"] for row in rows]) for rows in by_order]
        # Both orders of the first seed cost the same.
        cost = by_order[0][0]["flops"] / flops
        lines.append(f"| {selected} | {factor:g} | {cost:.2f} | {' | '.join(cells)} |")
    return [*lines, ""]


def budgets(found: Sequence[dict]) -> list[str]:
    """Accuracy of every size at the budgets that `set_budget` chose settings for."""
    rows = []
    for size in SIZES:
        sparse, dense = (of(found, kind, size, f"{kind}_{size}") for kind in ("sparse", "dense"))
        if not sparse or not dense:
            continue
        for share, found_there in at_budgets(sparse).items():
            relative = found_there[0]["flops"] / dense[0]["forward_flops"]
            top1 = spread([row["top1"] for row in found_there])
            rows.append(f"| {size} | {share} | {relative:.2f} | {top1} | {len(found_there)} |")
    if not rows:
        return []
    return [
        "By `set_budget`, on validation typefaces: a K and a capacity for each layer, weights as trained, BPR.",
        "",
        "| size | share of its FLOPs asked for | of the dense FLOPs | top-1 | seeds |",
        "| --- " * 5 + "|",
        *rows,
        "",
    ]


def at_setting(runs: Sequence[dict], selected: int, factor: float, order: bool) -> list[dict]:
    """What the runs that were asked for it found at K, a capacity and an order of claiming slots."""
    asked = (selected, factor, order)
    names = ("num_selected_experts", "capacity_factor", "batch_priority")
    return [row for run in runs for row in run["settings"] if tuple(row[name] for name in names) == asked]


def at_budgets(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """{share of the FLOPs: what the runs that were asked for it found}, as the first run has them."""
    return {share: [run["budgets"][share] for run in runs if share in run["budgets"]] for share in runs[0]["budgets"]}


def layers(found: Sequence[dict]) -> list[str]:
    """How much a token's expert tells, and by chance, of what it may go by, layer by layer."""
    sparse = of(found, "sparse", "middle", "sparse_middle")
    if not sparse:
        return []
    what = tuple(next(iter(sparse[0]["routing"].values())))
    lines = [
        "What a token's first expert tells of it: mutual information in bits, and in brackets what it is by chance.",
        "",
    ]
    lines += [f"| layer | {' | '.join(what)} |", "| --- " * (len(what) + 1) + "|"]
    for name in sparse[0]["routing"]:
        cells = []
        for each in what:
            bits, chance = (
                statistics.mean(run["routing"][name][each][key] for run in sparse) for key in ("bits", "chance")
            )
            cells.append(f"{bits:.3f} ({chance:.3f})")
        lines.append(f"| {layer_label(name)} | {' | '.join(cells)} |")
    return [*lines, ""]


def upcycled(found: Sequence[dict]) -> list[str]:
    """A dense model that goes on, against its upcycled copy at equal added FLOPs."""
    shared = together(of(found, "upcycled", "middle", "upcycled"), of(found, "continued", "middle", "continued"))
    if not shared:
        return []
    sparse, dense = zip(*shared)
    differences = [100 * (a["test"]["all"] - b["test"]["all"]) for a, b in zip(sparse, dense)]
    return [
        "A trained dense model of the middle size goes on, as it is or upcycled, for equal added FLOPs:",
        "",
        "| upcycled | dense goes on | difference of each seed, points |",
        "| --- | --- | --- |",
        f"| {spread([run['test']['all'] for run in sparse])} | {spread([run['test']['all'] for run in dense])} "
        f"| {', '.join(f'{each:+.2f}' for each in differences)} |",
        "",
    ]


def chosen(found: Sequence[dict]) -> list[str]:
    """The search that chose the settings, on the validation typefaces."""
    by_name = {run["name"]: run for run in found}
    tried = [(*spec, by_name[run.name]) for spec, run in zip(SEARCH.items(), search()) if run.name in by_name]
    rows = [
        f"| {kind} | {size.width} | {label} | {run['images']:,} | {run['forward_flops'] / 1e6:.1f} "
        f"| {100 * run['validation']['all']:.2f} |"
        for label, (kind, size, *_), run in tried
    ]
    if not rows:
        return []
    return [
        "What was tried, on the validation typefaces; where nothing is said, with Muon and what the study chose:",
        "",
        "| kind | width | setting | images | MFLOPs | top-1 |",
        "| --- " * 6 + "|",
        *rows,
        "",
    ]
