"""The parts of a report on a V-MoE that tell of its experts: each says in words and numbers what its figures show."""

import math
from collections.abc import Sequence

from vmoe_torch.analyze.heatmaps import NAMED_CLASSES, expert_by_class, expert_by_position
from vmoe_torch.analyze.loads import expert_loads, gates_by_depth
from vmoe_torch.analyze.patches import ORDERS, KeptPatches, kept_patches_animation, kept_patches_grid
from vmoe_torch.analyze.statistics import LayerRouting
from vmoe_torch.data.names import shown
from vmoe_torch.report import Figure, Section, Table
from vmoe_torch.report.style import layer_label, percent

# Layers whose kept patches are drawn; of more, evenly spread ones.
MOST_GRIDS = 4


def load_section(routings: dict[str, LayerRouting]) -> Section:
    """Load, drops and gates of every layer, at the routing that was set."""
    rows = []
    for name, routing in routings.items():
        demand = routing.demand
        rows.append(
            (
                layer_label(name),
                f"{routing.capacity_factor:.2f}",
                f"{float(demand.max()):.2f}",
                f"{float(demand.min()):.2f}",
                f"{100 * routing.dropped:.1f}",
                f"{100 * routing.unprocessed / max(routing.tokens, 1):.1f}",
            )
        )
    busiest = max(routings, key=lambda name: float(routings[name].demand.max()))
    worst = max(routings, key=lambda name: routings[name].dropped)
    medians = {name: routing.gate_quantiles(0.5)[:, 0].tolist() for name, routing in routings.items()}
    first, last = next(iter(medians)), list(medians)[-1]
    gates = f"The median first gate is {medians[first][0]:.2f} in {layer_label(first)}"
    if len(medians) > 1:
        gates += f" and {medians[last][0]:.2f} in {layer_label(last)}"
    if len(medians[last]) > 1:
        gates += f"; of the second choice it is {medians[first][1]:.2f}"
        gates += f" and {medians[last][1]:.2f}" if len(medians) > 1 else ""
    return Section(
        "How much every expert has to do",
        paragraphs=[
            "Measured with the model's own routing. Blocks count from 0. “Slots” are those per choice; the "
            "busiest and the idlest expert are given in choices that wanted them, times the balanced number."
        ],
        table=Table(
            ("layer", "slots", "busiest expert", "idlest expert", "dropped choices %", "skipped tokens %"), rows
        ),
        figures=[
            Figure(
                "loads",
                expert_loads(routings),
                f"Who is wanted how much. The busiest expert, in {layer_label(busiest)}, is wanted "
                f"{float(routings[busiest].demand.max()):.2f} times as often as a balanced one; most choices are "
                f"dropped in {layer_label(worst)}, {percent(routings[worst].dropped)}.",
                "Bar charts of the choices that each expert processes and drops, for each layer of experts",
            ),
            Figure(
                "gates",
                gates_by_depth(routings),
                f"{gates}. Close to 1, one expert counts alone; 1 / E is undecided.",
                "Distributions of the gates of first and second choices, for each layer of experts",
            ),
        ],
    )


def class_section(routings: dict[str, LayerRouting], class_names: Sequence[str]) -> Section:
    """Which expert processes which class, layer by layer."""
    images = len(next(iter(routings.values())).kept.sum(1).nonzero())
    dependent = {
        name: float((routing.class_dependence * routing.kept.sum(1)).sum() / routing.kept.sum().clamp(min=1))
        for name, routing in routings.items()
    }
    rows = [
        (layer_label(name), f"{100 * dependent[name]:.1f}", _or_dash(100 * routing.position_dependence))
        for name, routing in routings.items()
    ]
    most = max(dependent, key=dependent.get)
    return Section(
        "Which expert processes which class",
        paragraphs=[
            "How much the choice of experts depends on the class of an image, and on a patch's place in it: the share "
            "of choices that would have to move for every class (every place) to use the experts as the average does. "
            f"0% is no dependence. It is largest for the class in {layer_label(most)}, {percent(dependent[most])}."
            + (" Of classes with few images much of it is chance." if images > NAMED_CLASSES else "")
        ],
        table=Table(("layer", "depends on the class, %", "depends on the place, %"), rows),
        figures=[_class_figure(name, routing, class_names) for name, routing in routings.items()],
        wide=images > 12,
    )


def _or_dash(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _class_figure(name: str, routing: LayerRouting, class_names: Sequence[str]) -> Figure:
    share = routing.expert_share
    label, expert = divmod(int(share.argmax()), share.shape[1])
    return Figure(
        f"experts_{name.replace('.', '_')}",
        expert_by_class(routing, class_names, name),
        f"{layer_label(name).capitalize()}. Each column adds up to 100%. The most specialised pair: expert {expert} "
        f"processes {percent(float(share.max()))} of what is kept of class {shown(class_names[label])}; spread evenly, "
        f"every cell would be {percent(1 / share.shape[1])}. Experts and classes are ordered so that neighbours look "
        "alike.",
        f"Heat map of experts by classes in {layer_label(name)}",
    )


def position_section(routings: dict[str, LayerRouting]) -> Section | None:
    """Which expert processes which place of the image, layer by layer; None for a model without a grid of patches."""
    figures = []
    for name, routing in routings.items():
        if routing.positions is None:
            continue
        counts = routing.positions
        share = counts / counts.sum(2, keepdim=True).clamp(min=1)
        place, expert = divmod(int(share.argmax()), share.shape[2])
        row, column = divmod(place, share.shape[1])
        figures.append(
            Figure(
                f"positions_{name.replace('.', '_')}",
                expert_by_position(routing, name),
                f"{layer_label(name).capitalize()}. Every map is the image; bright places go to this expert. The "
                f"strongest: expert {expert} has {percent(float(share.max()))} of row {row + 1}, column {column + 1} "
                f"of the {share.shape[0]} x {share.shape[1]} patches. Choices depend on the place by "
                f"{percent(routing.position_dependence)}.",
                f"Maps of the image, one for each expert of {layer_label(name)}",
            )
        )
    if not figures:
        return None
    return Section(
        "Which expert processes which place of the image",
        paragraphs=["The class token and registers, if there are any, have no place and are left out."],
        figures=figures,
        wide=next(iter(routings.values())).kept.shape[1] > 16,
    )


def patch_section(patches: KeptPatches, capacity_factors: Sequence[float]) -> Section:
    """Which patches each capacity keeps: up to four layers as pictures, the last one as an animation.

    Args:
        patches: what was kept.
        capacity_factors: to draw as rows, of those in `patches`; the animation runs over all.
    """
    names = list(patches.kept)
    last = names[-1]
    count = len(patches.class_names)
    if patches.group_images == 1:
        group = "Every image is a group of its own, with its own slots."
    elif patches.group_images == count:
        group = f"The {count} images form one group and share its slots."
    else:
        group = f"Groups of {patches.group_images} images, from the left, share slots."
    shown = names if len(names) <= MOST_GRIDS else [names[round(i * (len(names) - 1) / 3)] for i in range(MOST_GRIDS)]
    some = f" {MOST_GRIDS} of the {len(names)} layers are shown." if len(shown) < len(names) else ""
    figures = [
        Figure(
            "patches",
            kept_patches_animation(patches, last, f"Patches that the experts of {layer_label(last)} process"),
            f"{layer_label(last).capitalize()}, the capacity falling from {patches.capacity_factors[0]:g} to "
            f"{patches.capacity_factors[-1]:g}. {_kept_text(patches, last, capacity_factors)}",
            f"Animation over falling capacity of the patches that {layer_label(last)} processes, vanilla and BPR",
        )
    ]
    for name in shown:
        rows = []
        for capacity in sorted(capacity_factors, reverse=True):
            place = patches.capacity_factors.index(capacity)
            rows += [
                (f"C = {capacity:g}\n{order}", patches.kept[name][place, number])
                for number, (_, order) in enumerate(ORDERS)
            ]
        figures.append(
            Figure(
                f"patches_{name.replace('.', '_')}",
                kept_patches_grid(
                    patches.pictures,
                    rows,
                    patches.class_names,
                    f"Patches that the experts of {layer_label(name)} process",
                ),
                f"{layer_label(name).capitalize()}. {_kept_text(patches, name, capacity_factors)}",
                f"Grid of images with the dropped patches hidden, by capacity and order, in {layer_label(name)}",
            )
        )
    return Section(
        "Which patches each capacity keeps",
        paragraphs=[
            f"{group} Below each picture stands how many of its patches at least one expert processed; pale blue "
            f"patches skip the layer. Vanilla serves patches by position, those of the images on the left first, "
            f"whatever they show; BPR serves the patches with the largest gates of all images first.{some}"
        ],
        figures=figures,
        wide=True,
    )


def _kept_text(patches: KeptPatches, layer: str, capacity_factors: Sequence[float]) -> str:
    """Numbers at the second smallest capacity drawn."""
    capacity = sorted(capacity_factors)[min(1, len(capacity_factors) - 1)]
    vanilla, priority = (patches.shares(layer, capacity, order) for order, _ in ORDERS)
    return (
        f"At C = {capacity:g} vanilla processes {percent(vanilla[0])} of the patches of the first image and "
        f"{percent(vanilla[-1])} of the last one; BPR from {percent(min(priority))} to {percent(max(priority))} of "
        "each image."
    )
