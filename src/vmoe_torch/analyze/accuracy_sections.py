"""The parts of a report on a V-MoE that tell of accuracy: each says in words and numbers what its figures show."""

import math
from collections.abc import Sequence

from vmoe_torch.analyze.ablation import Ablation
from vmoe_torch.analyze.curves import capacity_curve, router_ablation, selected_experts_curve
from vmoe_torch.evaluate import Evaluation
from vmoe_torch.report import Figure, Section, Table
from vmoe_torch.report.style import flops_unit, layer_label, percent


def by_setting(evaluations: Sequence[Evaluation]) -> dict[tuple[int | None, float], dict[bool, Evaluation]]:
    """{(experts per token, asked capacity): {BPR: evaluation}}, in their order."""
    found: dict = {}
    for e in evaluations:
        key = (e.setting.num_selected_experts, e.setting.capacity_factor)
        found.setdefault(key, {})[e.setting.batch_priority] = e
    return found


def summary(
    own: Evaluation, evaluations: Sequence[Evaluation], dense: Evaluation | None, dense_name: str, routing: str
) -> list[str]:
    """What the report says first: accuracy and compute as the model is, and at the smallest capacity of the grid."""
    scale, unit = flops_unit(own.flops.total)
    error = math.sqrt(own.top1 * (1 - own.top1) / own.images)
    texts = [
        f"With its own routing ({routing}) the model reaches {percent(own.top1)} on {own.images:,} images (standard "
        f"error: {100 * error:.1f} points), with {own.flops.total / scale:#.4g} {unit} per image."
    ]
    capacity, pair = _smallest(evaluations)
    low = pair[True]
    texts.append(
        f"Its compute can be turned down without retraining: every expert gets fewer slots, and a token that finds "
        f"none passes the layer by. At capacity factor {capacity:g}, with {low.flops.total / scale:#.4g} {unit}, it "
        f"reaches {percent(low.top1)} when the tokens with the largest gates claim their slots first (Batch Priority "
        f"Routing, BPR), and {percent(pair[False].top1)} when they claim them by position (vanilla)."
    )
    if dense is not None:
        compute = f"{dense.flops.total / scale:#.4g} {unit}"
        texts.append(f"{dense_name}, on the same images, reaches {percent(dense.top1)} with {compute}.")
    return texts


def _smallest(evaluations: Sequence[Evaluation]) -> tuple[float, dict[bool, Evaluation]]:
    """The smallest capacity of the number of experts per token that the grid begins with, and what was reached."""
    selected = evaluations[0].setting.num_selected_experts
    pairs = [(capacity, pair) for (count, capacity), pair in by_setting(evaluations).items() if count == selected]
    return min(pairs, key=lambda pair: pair[0])


def accuracy_section(evaluations: Sequence[Evaluation], dense: Evaluation | None, dense_name: str) -> Section:
    """Accuracy and compute at every number of experts, capacity and order.

    Args:
        evaluations: a full grid of them, each with BPR and without.
        dense: a model to compare with, if there is one.
        dense_name: what to call it.
    """
    scale, unit = flops_unit(max(e.flops.total for e in evaluations))
    rows, best, breaks = [], set(), set()
    places = by_setting(evaluations)
    for number, ((selected, capacity), pair) in enumerate(places.items()):
        vanilla, priority = pair[False], pair[True]
        if number and selected != rows[-1][0]:
            breaks.add(number)
        if priority.top1 != vanilla.top1:
            best.add((number, 5 if priority.top1 > vanilla.top1 else 4))
        rows.append(
            (
                selected,
                f"{capacity:g}",
                f"{priority.flops.total / scale:#.4g}",
                f"{priority.flops.relative:.2f}",
                f"{100 * vanilla.top1:.1f}",
                f"{100 * priority.top1:.1f}",
                f"{100 * vanilla.unprocessed:.0f}",
            )
        )
    header = ("experts per token", "capacity factor", f"{unit} per image", "times dense", "vanilla top-1 %")
    header += ("BPR top-1 %", "skipped tokens %")
    rows = [("own" if row[0] is None else str(row[0]), *row[1:]) for row in rows]
    compared = (
        f"The level line is {dense_name}: {percent(dense.top1)} on the same images, the star stands at its own "
        f"{dense.flops.total / scale:#.4g} {unit}."
        if dense is not None
        else "There is no line of a dense model, because none was given to compare with."
    )
    at_half = next((pair for (_, capacity), pair in places.items() if capacity == 0.5), None)
    half = (
        f" At 0.5 BPR reaches {percent(at_half[True].top1)}, vanilla {percent(at_half[False].top1)}." if at_half else ""
    )
    lowest, pair = _smallest(evaluations)
    return Section(
        "Accuracy and compute of the same weights",
        paragraphs=[
            "The capacity factor C sets how many slots the experts have for every choice that a token makes; 1 is just "
            "enough if the load is balanced. FLOPs count the matrix products of one forward pass with every slot, used "
            "or not; “times dense” compares them with the same network with one plain MLP in place of each "
            "layer of experts. “Skipped” tokens found no slot at any expert (vanilla).",
            *_rounding(evaluations),
        ],
        table=Table(header, rows, frozenset(best), frozenset(breaks)),
        figures=[
            Figure(
                "capacity_curve",
                capacity_curve(evaluations, dense=dense, dense_name=dense_name),
                f"Fewer slots per expert, from right to left.{half} At {lowest:g} BPR reaches "
                f"{percent(pair[True].top1)}, vanilla {percent(pair[False].top1)}.",
                "Accuracy against capacity factor for vanilla routing and BPR",
            ),
            Figure(
                "compute_curve",
                capacity_curve(evaluations, "flops", dense, dense_name),
                f"The same points against compute; along each line the capacity falls from right to left. {compared}",
                "Accuracy against FLOPs per image for vanilla routing and BPR",
            ),
        ],
    )


def _rounding(evaluations: Sequence[Evaluation]) -> list[str]:
    """Says so where whole slots make another capacity of the one asked for."""
    changed = {
        (e.setting.num_selected_experts, e.setting.capacity_factor): e.capacity_factor
        for e in evaluations
        if abs(e.capacity_factor / e.setting.capacity_factor - 1) > 0.05
    }
    if not changed:
        return []
    parts = [f"{c:g} is {got:.3g}" + (f" with {k} per token" if k else "") for (k, c), got in changed.items()]
    return [
        "Slots are whole, and the model may round them up further, so some capacities are other than asked for: "
        f"{', '.join(parts)}. The figures show what they are."
    ]


def change_section(
    ablations: Sequence[Ablation], selected: Sequence[Evaluation], own_selected: int | None, num_classes: int
) -> Section:
    """Accuracy with random routers, and with other numbers of experts per token.

    Args:
        ablations: what `ablate_routers` gives.
        selected: evaluations that differ in the number of experts per token, rising; may be none.
        own_selected: the model's own number; None if its layers differ.
        num_classes: of the model.
    """
    heading, figures = "Random routers", [_ablation_figure(ablations, num_classes)]
    paragraphs = [
        "The routers are replaced by random choices, one layer after the other and then all. Every token goes "
        "to experts drawn uniformly, and keeps its gates; weights are not touched. Where little is lost, the layer "
        "did not need its router, or the model hardly needs the layer.",
    ]
    if selected:
        heading += ", and other numbers of experts"
        paragraphs.append(
            "Then the number of experts per token, K, changed after training. The capacity factor and the order stay "
            "as the model has them, so the slots grow with K."
        )
        figures.append(_selected_figure(selected, own_selected))
    return Section(heading, paragraphs=paragraphs, figures=figures)


def _ablation_figure(ablations: Sequence[Ablation], num_classes: int) -> Figure:
    whole, *replaced = ablations
    costs = {a: 100 * (whole.top1 - a.top1) for a in replaced}
    worst = max((a for a in replaced if len(a.layers) == 1), key=costs.get)
    text = (
        f"With trained routers: {percent(whole.top1)}. Random choices cost most in {layer_label(worst.layers[0])}, "
        f"{costs[worst]:.1f} points"
    )
    if len(replaced[-1].layers) > 1:
        text += f"; in all {len(replaced[-1].layers)} layers together they cost {costs[replaced[-1]]:.1f}"
    return Figure(
        "random_routers",
        router_ablation(ablations, 1 / num_classes),
        f"{text}.",
        "Accuracy with the router of each layer replaced by random choices",
    )


def _selected_figure(selected: Sequence[Evaluation], own_selected: int | None) -> Figure:
    best = max(selected, key=lambda e: e.top1)
    first, last = selected[0], selected[-1]
    scale, unit = flops_unit(last.flops.total)
    return Figure(
        "experts_per_token",
        selected_experts_curve(selected, own_selected),
        f"From K={first.setting.num_selected_experts} to K={last.setting.num_selected_experts} the compute goes from "
        f"{first.flops.total / scale:#.4g} to {last.flops.total / scale:#.4g} {unit} per image and the accuracy from "
        f"{percent(first.top1)} to {percent(last.top1)}; the best is {percent(best.top1)} at "
        f"K={best.setting.num_selected_experts}.",
        "Accuracy against the number of experts per token",
    )
