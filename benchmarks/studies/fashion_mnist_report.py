"""What the study of Fashion-MNIST found, over its seeds: numbers, sentences, and the figure."""

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.harness.results import heading
from vmoe_torch.analyze import capacity_curve
from vmoe_torch.evaluate import Evaluation, Flops, RoutingSetting

# (experts per token, asked capacity)
Place = tuple[int, float]
NAMES = {"vmoe": "V-MoE", "dense_steps": "dense, equal steps", "dense_flops": "dense, equal training FLOPs"}
# From here down, BPR is expected to be at least as good as vanilla.
LOW_CAPACITY = 0.5
BAND = {True: "#0072B2", False: "#D55E00"}


def accuracies(results: Sequence[dict], model: str) -> list[float]:
    """Top-1 of a model's runs in percent, by seed."""
    return [100 * one["top1"] for one in sorted(results, key=lambda one: one["seed"]) if one["model"] == model]


def grid(results: Sequence[dict]) -> dict[Place, dict[bool, list[dict]]]:
    """The V-MoE's rows by place and by BPR; each list by seed."""
    places: dict[Place, dict[bool, list[dict]]] = {}
    for one in sorted(results, key=lambda one: one["seed"]):
        for row in one.get("settings", ()):
            place = row["num_selected_experts"], row["capacity_factor"]
            places.setdefault(place, {False: [], True: []})[row["batch_priority"]].append(row)
    return places


def differences(pair: dict[bool, list[dict]], key: str = "top1") -> list[float]:
    """BPR - vanilla by seed: points of top-1, or nats of loss."""
    scale = 100 if key == "top1" else 1
    return [scale * (priority[key] - vanilla[key]) for vanilla, priority in zip(pair[False], pair[True])]


def markdown(results: Sequence[dict], made: dict[str, str]) -> list[str]:
    """The results file."""
    seeds = len(accuracies(results, "vmoe"))
    lines = heading("Fashion-MNIST: a V-MoE, the dense ViT, and less and less capacity", made)
    lines.append(
        f"{seeds} seeds; numbers are mean ± standard deviation over seeds, on all test images, of the last weights. "
        "The recipes are `fashion_mnist` and `fashion_mnist_dense`; no setting was chosen on the test images. Training "
        "FLOPs are three forwards for every image."
    )
    lines += ["", "## What the numbers show", "", *(f"- {text}" for text in sentences(results))]
    lines += ["", "## V-MoE and dense", "", *_models(results)]
    lines += ["", "## The same weights at less capacity", "", *_settings(results)]
    lines += ["", "![Accuracy against capacity](../../../docs/figures/capacity_curve.png)"]
    return lines


def sentences(results: Sequence[dict]) -> list[str]:
    """What the numbers show, whichever way they fall."""
    sparse = accuracies(results, "vmoe")
    found = []
    for model, terms in (("dense_steps", "equal steps"), ("dense_flops", "equal training FLOPs")):
        gaps = [a - b for a, b in zip(sparse, accuracies(results, model))]
        mean = statistics.mean(gaps)
        word = "better" if mean > 0 else "worse"
        agree = sum(gap * mean > 0 for gap in gaps)
        found.append(
            f"At {terms} the V-MoE is {abs(mean):.2f} points {word} than the dense ViT, {agree} of {len(gaps)} seeds "
            f"agreeing ({_signed(gaps)})."
        )
    places = grid(results)
    low = {place: differences(pair) for place, pair in places.items() if place[1] <= LOW_CAPACITY}
    worse = [
        f"K={selected}, C={capacity:g} ({_signed(gaps)})"
        for (selected, capacity), gaps in low.items()
        if any(gap < 0 for gap in gaps)
    ]
    count = sum(len(gaps) for gaps in low.values())
    if worse:
        found.append(f"BPR is worse than vanilla for some seed at a capacity of {LOW_CAPACITY:g} or less: ")
        found[-1] += "; ".join(worse) + "."
    else:
        found.append(
            f"BPR is at least as good as vanilla at every capacity of {LOW_CAPACITY:g} or less, in all {count} "
            "comparisons (settings times seeds)."
        )
    place, gaps = max(low.items(), key=lambda item: statistics.mean(item[1]))
    found.append(
        f"The largest gain of BPR is {statistics.mean(gaps):.2f} points, at K={place[0]} and C={place[1]:g}: "
        f"{_mean(places[place][True])} against {_mean(places[place][False])} %."
    )
    start = max(places)
    for priority, order in ((True, "BPR"), (False, "vanilla")):
        costs = [
            f"{_mean(pair[priority]) - _mean(places[start][priority]):+.2f} at C={capacity:g}"
            for (selected, capacity), pair in places.items()
            if selected == start[0] and capacity <= LOW_CAPACITY
        ]
        found.append(f"From C={start[1]:g} down, with K={start[0]}, {order} changes by {', '.join(costs)} points.")
    return found


def _models(results: Sequence[dict]) -> list[str]:
    lines = ["| model | epochs | updates | training TFLOPs | parameters | top-1 % | by seed |", "| --- " * 7 + "|"]
    for model, name in NAMES.items():
        one = next(one for one in results if one["model"] == model)
        tops = accuracies(results, model)
        lines.append(
            f"| {name} | {one['epochs']} | {one['updates']:,} | {one['training_flops'] / 1e12:.2f} "
            f"| {one['parameters']:,} | {_spread(tops)} | {', '.join(f'{top:.2f}' for top in tops)} |"
        )
    return lines


def _settings(results: Sequence[dict]) -> list[str]:
    lines = [
        "| K | capacity | MFLOPs per image | times dense | vanilla top-1 % | BPR top-1 % | BPR - vanilla, points "
        "| by seed | vanilla loss | BPR loss |",
        "| --- " * 10 + "|",
    ]
    for (selected, capacity), pair in grid(results).items():
        vanilla, priority = ([100 * row["top1"] for row in pair[order]] for order in (False, True))
        losses = (statistics.mean(row["loss"] for row in pair[order]) for order in (False, True))
        first, gaps = pair[True][0], differences(pair)
        lines.append(
            f"| {selected} | {capacity:g} | {first['flops'] / 1e6:.2f} | {first['relative_flops']:.2f} "
            f"| {_spread(vanilla)} | {_spread(priority)} | {statistics.mean(gaps):+.2f} | {_signed(gaps)} "
            f"| {' | '.join(f'{loss:.3f}' for loss in losses)} |"
        )
    return lines


def _mean(rows: list[dict]) -> float:
    return round(100 * statistics.mean(row["top1"] for row in rows), 2)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _signed(values: list[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def figure(results: Sequence[dict]) -> Figure:
    """Mean accuracy over capacity, a band from the lowest seed to the highest, and the dense models as level lines."""
    places = grid(results)
    canvas = capacity_curve(
        [_average(place, order, rows) for place, pair in places.items() for order, rows in pair.items()]
    )
    axes = canvas.axes[0]
    for order, colour in BAND.items():
        for selected in sorted({place[0] for place in places}):
            rows = sorted(
                (pair[order] for place, pair in places.items() if place[0] == selected),
                key=lambda rows: rows[0]["actual_capacity_factor"],
            )
            capacities = [each[0]["actual_capacity_factor"] for each in rows]
            low, high = ([100 * end(row["top1"] for row in each) for each in rows] for end in (min, max))
            axes.fill_between(capacities, low, high, color=colour, alpha=0.15, linewidth=0)
    for model, dashes in (("dense_steps", ":"), ("dense_flops", "-")):
        level = statistics.mean(accuracies(results, model))
        axes.axhline(level, color="#6E6E6E", linewidth=1, linestyle=dashes, label=NAMES[model])
    seeds = len(accuracies(results, "vmoe"))
    axes.set_title(f"Fashion-MNIST: less capacity, same weights (mean and range of {seeds} seeds)", fontsize="medium")
    # The limits that were set know neither the bands nor the levels.
    axes.autoscale(axis="y")
    axes.legend(title="order of claiming slots, experts per token", title_fontsize="small", fontsize="small")
    return canvas


def _average(place: Place, order: bool, rows: list[dict]) -> Evaluation:
    told = [key for key, value in rows[0].items() if key != "batch_priority" and value is not None]
    mean = {key: statistics.mean(row[key] for row in rows) for key in told}
    return Evaluation(
        RoutingSetting(place[1], place[0], order),
        rows[0]["images"],
        mean["top1"],
        mean["top5"],
        mean["loss"],
        mean["actual_capacity_factor"],
        mean["dropped"],
        mean["unprocessed"],
        Flops(mean["flops"], mean["flops"] / mean["relative_flops"]),
    )
