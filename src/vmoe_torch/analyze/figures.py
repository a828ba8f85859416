"""Figures of routing: capacity curves, experts by class, gates, and the patches that a capacity keeps.

Every function returns a matplotlib Figure that belongs to no global state. Colours are those of Okabe and Ito and of
the cividis and viridis maps, which colour-blind readers can tell apart.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from vmoe_torch.analyze.statistics import LayerRouting
from vmoe_torch.evaluate import Evaluation

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_STYLE = {True: (BLUE, "BPR", "o"), False: (ORANGE, "vanilla", "s"), None: (GREEN, "as trained", "D")}
_DASHES = ("-", "--", ":", "-.")
# Points of accuracy that an axis shows at least.
_LEAST_SPAN = 5.0
# Flat and pale blue, which no grey image has.
_HIDDEN = (0.70, 0.80, 0.93)


def capacity_curve(evaluations: Sequence[Evaluation], against: str = "capacity", dense: float | None = None) -> Canvas:
    """Top-1 accuracy over capacity or over FLOPs, one line for each number of experts and each order.

    Args:
        evaluations: of one model.
        against: "capacity" or "flops".
        dense: top-1 of a dense counterpart in 0..1, drawn as a level line; None draws nothing.

    Raises:
        ValueError: if `against` is neither.
    """
    if against not in ("capacity", "flops"):
        raise ValueError(f"against must be 'capacity' or 'flops', got {against!r}")
    canvas = Canvas(figsize=(6.4, 4.6), layout="constrained")
    axes = canvas.add_subplot()
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
                    [e.capacity_factor if against == "capacity" else e.flops.total / 1e6 for e in line],
                    [100 * e.top1 for e in line],
                    color=colour,
                    linestyle=_DASHES[rank % len(_DASHES)],
                    marker=marker,
                    markerfacecolor=colour if rank == 0 else "white",
                    label=f"{label}, K={count}" if count else label,
                )
    if dense is not None:
        axes.axhline(100 * dense, color=GREY, linewidth=1, label="dense counterpart")
    if against == "capacity":
        ticks = sorted({e.setting.capacity_factor or e.capacity_factor for e in evaluations})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{tick:g}" for tick in ticks])
        axes.set_xlabel("capacity factor C (slots per choice, log scale)")
    else:
        axes.set_xlabel("compute of a forward pass (MFLOPs per image)")
    # Differences of less than a point are mostly chance: never let them fill the picture.
    low, high = axes.get_ylim()
    room = max(0.0, _LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - room, high + room)
    axes.set_ylabel("test accuracy, top-1 (%)")
    axes.set_title("Accuracy against " + {"capacity": "capacity", "flops": "compute"}[against] + ", same weights")
    axes.grid(alpha=0.3)
    axes.legend(title="order of claiming slots, experts per token", title_fontsize="small", fontsize="small")
    return canvas


def expert_by_class(routing: LayerRouting, class_names: Sequence[str], layer: str) -> Canvas:
    """Heat map of where the patches of each class go, in percent of the class.

    Experts and classes are ordered along the first axis of a correspondence analysis, which puts experts with similar
    classes, and classes with similar experts, side by side.

    Args:
        routing: of the layer.
        class_names: (N,) names.
        layer: what to call the layer in the title.
    """
    share = 100 * routing.expert_share.double().T
    experts, classes = _correspondence_order(share)
    table = share[experts][:, classes].numpy()
    canvas = Canvas(figsize=(2.6 + 0.46 * table.shape[1], 2.0 + 0.4 * table.shape[0]), layout="constrained")
    axes = canvas.add_subplot()
    image = axes.imshow(table, cmap="cividis", vmin=0, aspect="auto")
    axes.set_xticks(range(table.shape[1]), [class_names[c] for c in classes], rotation=45, ha="right")
    axes.set_yticks(range(table.shape[0]), [f"expert {e}" for e in experts.tolist()])
    axes.set_title(f"Which expert processes which class: {layer}")
    if table.size <= 400:
        for (row, column), value in np.ndenumerate(table):
            shade = "black" if value > 0.55 * table.max() else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=8)
    bar = canvas.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"share of the class's processed choices (%)\nevenly spread: {100 / table.shape[0]:.3g}")
    return canvas


def _correspondence_order(table: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of rows and of columns, by their first axis of a correspondence analysis."""
    table = table / table.sum().clamp(min=torch.finfo(table.dtype).tiny)
    rows, columns = table.sum(1), table.sum(0)
    expected = torch.outer(rows, columns)
    scale = expected.clamp(min=1e-12).sqrt()
    left, _, right = torch.linalg.svd((table - expected) / scale, full_matrices=False)
    row_score = left[:, 0] / rows.clamp(min=1e-12).sqrt()
    column_score = right[0] / columns.clamp(min=1e-12).sqrt()
    # The sign of an axis is free: the first class comes in the left half.
    sign = -1.0 if column_score[0] > column_score.median() else 1.0
    return (sign * row_score).argsort(stable=True), (sign * column_score).argsort(stable=True)


def gate_histograms(routings: dict[str, LayerRouting]) -> Canvas:
    """Load of every expert, and histograms of the gates by choice rank, one row of two panels for each layer."""
    canvas = Canvas(figsize=(8.4, 0.6 + 2.5 * len(routings)), layout="constrained")
    panels = canvas.subplots(len(routings), 2, squeeze=False, sharex="col")
    for (name, routing), (load_axes, gate_axes) in zip(routings.items(), panels):
        load = (100 * routing.load).tolist()
        load_axes.bar(range(len(load)), load, color=BLUE)
        load_axes.axhline(100 / len(load), color=GREY, linestyle="--", linewidth=1, label="balanced")
        load_axes.set_title(f"{name}: {100 * routing.dropped:.1f}% of choices dropped", fontsize="medium")
        load_axes.set_ylabel("share of the work (%)")
        load_axes.set_ylim(0, 1.3 * max(*load, 100 / len(load)))
        load_axes.legend(fontsize="small", loc="upper right")
        edges = np.linspace(0, 1, routing.gates.shape[1] + 1)
        for rank, (histogram, colour) in enumerate(zip(routing.gates, (BLUE, ORANGE, GREEN))):
            share = 100 * histogram / histogram.sum().clamp(min=1)
            gate_axes.stairs(share.numpy(), edges, color=colour, fill=True, alpha=0.45, label=f"choice {rank + 1}")
        gate_axes.set_title(f"{name}: gates", fontsize="medium")
        gate_axes.set_ylabel("share of tokens (%)")
        gate_axes.set_xlim(0, 1)
        gate_axes.legend(fontsize="small", loc="upper right")
    panels[-1, 0].set_xlabel("expert")
    panels[-1, 1].set_xlabel("gate (softmax over experts)")
    return canvas


def kept_patches_grid(
    images: Tensor, rows: Sequence[tuple[str, Tensor]], class_names: Sequence[str], title: str
) -> Canvas:
    """Images in columns, settings in rows; patches that no expert processed are hidden under a flat pale blue.

    Args:
        images: (B, H, W) grey or (B, H, W, 3) colours in 0..1.
        rows: (label, (B, h, w) kept choices of each patch); H and W are multiples of h and w.
        class_names: (B,) names of the images' classes.
        title: of the figure.
    """
    pictures = (images if images.ndim == 4 else images.unsqueeze(-1).expand(-1, -1, -1, 3)).float()
    count, height, width = pictures.shape[:3]
    # One pair of axes with every picture in its own place is ten times as fast as axes for each.
    right, down = 1.07 * width, 1.2 * height
    canvas = Canvas(figsize=(1.5 + 0.95 * count, 0.9 + 1.08 * (len(rows) + 1)), layout="constrained")
    axes = canvas.add_subplot()
    lines = [("input", pictures, [""] * count)]
    for label, kept in rows:
        hidden = [_hide(picture, patches > 0) for picture, patches in zip(pictures, kept)]
        lines.append((label, hidden, [f"{int((patches > 0).sum())}/{patches.numel()}" for patches in kept]))
    for row, (label, shown, texts) in enumerate(lines):
        axes.text(-0.1 * width, row * down + height / 2, label, ha="right", va="center", fontsize=10)
        for column, (picture, text) in enumerate(zip(shown, texts)):
            x, y = column * right, row * down
            axes.imshow(picture.numpy(), extent=(x, x + width, y + height, y), vmin=0, vmax=1)
            axes.text(x + width / 2, y + height, text, ha="center", va="top", fontsize=7)
    for column, name in enumerate(class_names):
        axes.text(column * right + width / 2, -0.08 * height, name, ha="center", va="bottom", fontsize=9)
    axes.set_xlim(-0.1 * width, count * right)
    axes.set_ylim(len(lines) * down, -0.25 * height)
    axes.set_axis_off()
    axes.set_title(title)
    return canvas


def _hide(picture: Tensor, processed: Tensor) -> Tensor:
    """(H, W, 3) with every patch that is not processed under a flat colour."""
    height, width = picture.shape[0] // processed.shape[0], picture.shape[1] // processed.shape[1]
    mask = processed.repeat_interleave(height, 0).repeat_interleave(width, 1).unsqueeze(-1)
    return torch.where(mask, picture, torch.tensor(_HIDDEN))
