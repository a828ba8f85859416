"""Figures of accuracy: against capacity or compute, with other numbers of experts per token, with random routers."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, NullLocator

from vmoe_torch.analyze.ablation import Ablation
from vmoe_torch.analyze.lettering import Lettering
from vmoe_torch.evaluate import Evaluation
from vmoe_torch.report.style import BLUE, GREEN, GREY, ORANGE, flops_unit, layer_label

_STYLE = {True: (BLUE, "BPR", "o"), False: (ORANGE, "vanilla", "s"), None: (GREEN, "as trained", "D")}
_DASHES = ("-", "--", ":", "-.")
# Points of accuracy that an axis shows at least.
_LEAST_SPAN = 5.0


def capacity_curve(
    evaluations: Sequence[Evaluation],
    against: str = "capacity",
    dense: Evaluation | None = None,
    dense_name: str = "dense model",
) -> Canvas:
    """Top-1 accuracy over capacity or over FLOPs, one line for each number of experts and each order.

    Args:
        evaluations: of one model.
        against: "capacity" or "flops".
        dense: a model to compare with, drawn as a level line, with a mark at its own FLOPs; None draws nothing.
        dense_name: what to call it.

    Raises:
        ValueError: if `against` is neither.
    """
    if against not in ("capacity", "flops"):
        raise ValueError(f"against must be 'capacity' or 'flops', got {against!r}")
    canvas = Canvas(figsize=(6.4, 4.6), layout="constrained")
    axes = canvas.add_subplot()
    lettering = Lettering([dense_name])
    scale, unit = flops_unit(max(e.flops.total for e in evaluations))
    selected = sorted({e.setting.num_selected_experts or 0 for e in evaluations}, reverse=True)
    for rank, count in enumerate(selected):
        for priority, (colour, label, marker) in _STYLE.items():
            line = [
                e
                for e in evaluations
                if (e.setting.num_selected_experts or 0) == count and e.setting.batch_priority is priority
            ]
            line.sort(key=lambda e: e.capacity_factor)
            if line:
                axes.plot(
                    [e.capacity_factor if against == "capacity" else e.flops.total / scale for e in line],
                    [100 * e.top1 for e in line],
                    color=colour,
                    linestyle=_DASHES[rank % len(_DASHES)],
                    marker=marker,
                    markerfacecolor=colour if rank == 0 else "white",
                    label=f"{label}, K={count}" if count else label,
                )
    if dense is not None:
        # A label that begins with an underscore would be left out.
        label = f" {dense_name}" if dense_name.startswith("_") else dense_name
        axes.axhline(100 * dense.top1, color=GREY, linewidth=1, label=lettering.text(label, 30))
        if against == "flops":
            axes.plot(dense.flops.total / scale, 100 * dense.top1, color=GREY, marker="*", markersize=12)
    if against == "capacity":
        asked = (e.setting.capacity_factor for e in evaluations)
        ticks = sorted({a if isinstance(a, int | float) else e.capacity_factor for a, e in zip(asked, evaluations)})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{tick:.3g}" for tick in ticks])
        axes.set_xlabel("capacity factor C (slots per choice, log scale)")
    else:
        axes.set_xlabel(f"compute of a forward pass ({unit} per image)")
    axes.set_title("Accuracy against " + {"capacity": "capacity", "flops": "compute"}[against] + ", same weights")
    _accuracy_axis(axes)
    axes.legend(
        title="order of claiming slots, experts per token",
        title_fontsize="small",
        prop={"family": lettering.families, "size": "small"},
    )
    return canvas


def selected_experts_curve(evaluations: Sequence[Evaluation], trained: int | None) -> Canvas:
    """Top-1 accuracy over the number of experts per token, each point with its compute.

    Args:
        evaluations: of one model, that differ in num_selected_experts.
        trained: the number that the model was trained with, marked; None marks nothing.
    """
    canvas = Canvas(figsize=(6.4, 4.6), layout="constrained")
    axes = canvas.add_subplot()
    counts = [e.setting.num_selected_experts for e in evaluations]
    scale, unit = flops_unit(max(e.flops.total for e in evaluations))
    axes.plot(counts, [100 * e.top1 for e in evaluations], color=BLUE, marker="o", markerfacecolor="white")
    for count, evaluation in zip(counts, evaluations):
        if count == trained:
            axes.plot(
                count, 100 * evaluation.top1, "o", color=BLUE, markersize=9, label=f"as set in the model, K={count}"
            )
        axes.annotate(
            f"{evaluation.flops.total / scale:#.4g}",
            (count, 100 * evaluation.top1),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(count) for count in counts])
    axes.margins(x=0.1)
    axes.set_xlabel(f"experts per token K (log scale); numbers at the points: {unit} per image")
    axes.set_title("Accuracy with other numbers of experts, same weights")
    _accuracy_axis(axes, headroom=0.12)
    if trained in counts:
        axes.legend(fontsize="small")
    return canvas


def router_ablation(ablations: Sequence[Ablation], chance: float) -> Canvas:
    """Top-1 accuracy with the router of one layer, or all, replaced by random choices.

    Args:
        ablations: what `ablate_routers` gives; the first is the model as it is.
        chance: accuracy of guessing, in 0..1, drawn as a level line where the axis reaches down to it.
    """
    whole, *replaced = ablations
    canvas = Canvas(figsize=(max(6.4, 1.6 + 0.45 * len(replaced)), 4.6), layout="constrained")
    axes = canvas.add_subplot()
    labels = [layer_label(a.layers[0]) if len(a.layers) == 1 else f"all {len(a.layers)}" for a in replaced]
    axes.axhline(100 * whole.top1, color=BLUE, label="trained routers everywhere")
    colours = [ORANGE if len(a.layers) == 1 else GREY for a in replaced]
    axes.vlines(range(len(replaced)), [100 * a.top1 for a in replaced], 100 * whole.top1, color=colours, linewidth=2)
    axes.scatter(range(len(replaced)), [100 * a.top1 for a in replaced], color=colours, s=45, zorder=3)
    axes.scatter([], [], color=ORANGE, s=45, label="random choices in one layer")
    if len(replaced) > 1:
        axes.scatter([], [], color=GREY, s=45, label="in all layers")
    _accuracy_axis(axes)
    if 100 * chance > axes.get_ylim()[0]:
        axes.axhline(100 * chance, color=GREY, linestyle=":", label="guessing")
    slanted = {"rotation": 45, "ha": "right"} if len(replaced) > 7 else {}
    axes.set_xticks(range(len(replaced)), labels, **slanted)
    axes.margins(x=0.1)
    axes.set_xlabel("layer of experts with random choices")
    axes.set_title("What the routers are worth: accuracy with random choices")
    axes.legend(fontsize="small", loc="best")
    return canvas


def _accuracy_axis(axes: Axes, headroom: float = 0.0) -> None:
    """Labels the axis of accuracies, and gives it a span that does not blow up chance."""
    low, high = axes.get_ylim()
    high += headroom * (high - low)
    # Differences of less than a point are mostly chance: never let them fill the picture.
    room = max(0.0, _LEAST_SPAN - (high - low)) / 2
    low = max(low - room, -1.0)
    axes.set_ylim(low, max(high + room, low + _LEAST_SPAN))
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
