"""Heat maps of which expert processes what: classes of images, and places in an image."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from vmoe_torch.analyze.lettering import Lettering
from vmoe_torch.analyze.statistics import LayerRouting
from vmoe_torch.report.style import HIDDEN, layer_label

# Classes with a column and a name of their own; of more, the most specialised get a second map.
NAMED_CLASSES = 24


def expert_by_class(routing: LayerRouting, class_names: Sequence[str], layer: str) -> Canvas:
    """Heat map of where the tokens of each class go, in percent of the class.

    Experts and classes are ordered along the first axis of a correspondence analysis, which puts experts with similar
    classes, and classes with similar experts, side by side. Classes without images are left out. Of more than
    `NAMED_CLASSES`, all stand nameless in a map above, and the ones that depart most from the average in one below.

    Args:
        routing: of the layer.
        class_names: (N,) names.
        layer: name of the layer, for the title.
    """
    seen = routing.kept.sum(1).nonzero().flatten()
    share = 100 * routing.expert_share[seen].double().T
    experts, order = correspondence_order(share)
    many = len(seen) > NAMED_CLASSES
    named = order
    if many:
        chosen = routing.class_dependence[seen].argsort(descending=True, stable=True)[:NAMED_CLASSES]
        named = order[torch.isin(order, chosen)]
    tables = ([share[experts][:, order].numpy()] if many else []) + [share[experts][:, named].numpy()]
    num_experts = len(experts)
    row = 0.36 if num_experts <= 16 else 0.2
    canvas = Canvas(
        figsize=(2.8 + 0.44 * len(named), len(tables) * (0.9 + row * max(num_experts, 4)) + 1.1), layout="constrained"
    )
    panels = canvas.subplots(len(tables), 1, squeeze=False)[:, 0]
    highest = max(tables[0].max(), 1e-9)
    for axes, table in zip(panels, tables):
        image = axes.imshow(table, cmap="cividis", vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
        size = {"fontsize": 7} if num_experts > 16 else {}
        axes.set_yticks(range(num_experts), [f"expert {e}" for e in experts.tolist()], **size)
    title = f"Which expert processes which class: {layer_label(layer)}"
    if many:
        panels[0].set_title(title)
        panels[0].set_xticks([])
        panels[0].set_xlabel(f"{len(seen)} classes")
        panels[1].set_title(f"the {len(named)} classes that depart most from the average", fontsize="medium")
    else:
        panels[0].set_title(title)
    names = [class_names[int(seen[c])] for c in named]
    lettering = Lettering(names)
    texts = [lettering.text(name, 18) for name in names]
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    panels[-1].set_xticks(range(len(texts)), texts, fontfamily=lettering.families, **slanted)
    if num_experts <= 16:
        _write_values(panels[-1], tables[-1], highest)
    bar = canvas.colorbar(image, ax=list(panels), shrink=0.9, aspect=30)
    bar.set_label(f"share of the class's processed choices (%)\nevenly spread: {100 / num_experts:.3g}")
    return canvas


def _write_values(axes: Axes, table: np.ndarray, highest: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        shade = "black" if value > 0.55 * highest else "white"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=8)


def correspondence_order(table: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of rows and of columns, by their first axis of a correspondence analysis.

    Args:
        table: (R, C) float64, at least 0.

    Returns:
        (R,) and (C,) permutations; they stay as they are in a table without structure.
    """
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


def expert_by_position(routing: LayerRouting, layer: str) -> Canvas:
    """One small map of the image for every expert: the share of each place's choices that it processes.

    Args:
        routing: of the layer, with positions.
        layer: name of the layer, for the title.

    Raises:
        ValueError: if the routing has no positions.
    """
    if routing.positions is None:
        raise ValueError(f"routing of {layer} must have positions, got none")
    counts = routing.positions.double()
    share = (100 * counts / counts.sum(2, keepdim=True)).numpy()
    height, width, num_experts = share.shape
    columns = min(num_experts, 4 if num_experts <= 16 else 8)
    lines = -(-num_experts // columns)
    # Every map in its own place of one pair of axes; the distance leaves room for its name.
    right, down = 1.12 * width, 1.0 * height + 0.3 * max(height, width)
    tile = min(1.05, 8.4 / columns)
    canvas = Canvas(
        figsize=(max(5.2, tile * columns + 1.8), 0.7 + tile * lines * down / right + 0.2), layout="constrained"
    )
    axes = canvas.add_subplot()
    colours = matplotlib.colormaps["cividis"].with_extremes(bad=HIDDEN)
    highest = np.nanmax(share, initial=1e-9)
    for expert in range(num_experts):
        x, y = expert % columns * right, expert // columns * down
        image = axes.imshow(
            np.ma.masked_invalid(share[:, :, expert]),
            cmap=colours,
            vmin=0,
            vmax=highest,
            extent=(x, x + width, y + height, y),
            interpolation="nearest",
        )
        axes.text(x + width / 2, y - 0.03 * height, f"expert {expert}", ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-0.02 * width, (columns - 1) * right + 1.02 * width)
    axes.set_ylim((lines - 1) * down + 1.02 * height, -0.3 * height)
    axes.set_axis_off()
    axes.set_title(f"Which expert processes which place of the image: {layer_label(layer)}", fontsize="medium")
    bar = canvas.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"share of the place's\nprocessed choices (%)\nevenly spread: {100 / num_experts:.3g}", fontsize=8)
    return canvas
