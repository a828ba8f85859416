"""Figures of how much every expert has to do, and of how sure the routers are."""

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vmoe_torch.analyze.statistics import LayerRouting
from vmoe_torch.report.style import BLUE, GREY, ORANGE, layer_label


def expert_loads(routings: dict[str, LayerRouting]) -> Canvas:
    """Choices that wanted each expert, kept and dropped, one panel for each layer.

    Args:
        routings: {layer name: routing}.
    """
    columns = min(len(routings), 2)
    lines = -(-len(routings) // columns)
    canvas = Canvas(figsize=(6.4, 0.9 + 1.9 * lines), layout="constrained")
    panels = canvas.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(routings) :]:
        axes.set_axis_off()
    for axes, (name, routing) in zip(panels.flat, routings.items()):
        demand = routing.demand.numpy()
        kept = demand * (routing.kept.sum(0) / routing.wanted.sum(0).clamp(min=1)).numpy()
        axes.bar(range(len(demand)), kept, color=BLUE)
        axes.bar(range(len(demand)), demand - kept, bottom=kept, color=ORANGE, hatch="////", edgecolor="white")
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_title(f"{layer_label(name)}: {100 * routing.dropped:.1f}% dropped", fontsize="medium")
        axes.set_xlabel("expert", fontsize="small")
        axes.set_xticks(range(0, len(demand), -(-len(demand) // 8)))
        axes.tick_params(labelsize="small")
    for axes in panels[:, 0]:
        axes.set_ylabel("choices, times\nthe balanced number", fontsize="small")
    canvas.legend(
        handles=[
            Patch(color=BLUE, label="processed"),
            Patch(facecolor=ORANGE, hatch="////", edgecolor="white", label="dropped: the expert was full"),
            Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="balanced"),
        ],
        loc="outside upper center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    return canvas


def gates_by_depth(routings: dict[str, LayerRouting]) -> Canvas:
    """Distributions of the gates of the first and second choices, layer after layer.

    Args:
        routings: {layer name: routing}, from the first layer to the last.
    """
    canvas = Canvas(figsize=(max(6.4, 2.2 + 0.55 * len(routings)), 4.6), layout="constrained")
    axes = canvas.add_subplot()
    ranks = max(len(routing.gates) for routing in routings.values())
    sides = ((-1, BLUE, "first choice"), (1, ORANGE, "second choice"))[:ranks]
    for place, routing in enumerate(routings.values()):
        medians = routing.gate_quantiles(0.5)[:, 0].tolist()
        for (side, colour, _), histogram, median in zip(sides, routing.gates, medians):
            edges = np.linspace(0, 1, len(histogram) + 1)
            share = (histogram / histogram.max().clamp(min=1)).numpy()
            reach = place + 0.44 * side * share
            axes.fill_betweenx(edges, place, np.append(reach, reach[-1]), step="post", color=colour, alpha=0.75, lw=0)
            axes.plot([place, place + 0.44 * side], [median, median], color="black", linewidth=1.6)
    names = [layer_label(name) for name in routings]
    slanted = {"rotation": 45, "ha": "right"} if len(names) > 7 else {}
    axes.set_xticks(range(len(names)), names, **slanted)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1)
    axes.set_ylabel("gate (softmax over experts)")
    axes.set_xlabel("layer of experts; the wider, the more tokens have this gate")
    axes.set_title("How sure the routers are: gates by depth")
    axes.grid(axis="y", alpha=0.3)
    handles = [Patch(color=colour, alpha=0.75, label=label) for _, colour, label in sides]
    handles.append(Line2D([], [], color="black", label="median"))
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return canvas
