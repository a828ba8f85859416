"""Figures of routers whose tokens choose nothing: experts per token, and which patches a slot draws from."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from vmoe_torch.analyze.lettering import Lettering
from vmoe_torch.analyze.shares import ExpertsPerToken, effective_number
from vmoe_torch.report.style import BLUE, HIDDEN, layer_label


def experts_that_took(layers: dict[str, ExpertsPerToken]) -> Canvas:
    """Shares of the tokens by the number of experts that took them, one panel for each layer.

    Args:
        layers: {layer name: counts}.
    """
    columns = min(len(layers), 2)
    lines = -(-len(layers) // columns)
    canvas = Canvas(figsize=(6.4, 0.6 + 1.9 * lines), layout="constrained")
    panels = canvas.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    most = max(counted.highest for counted in layers.values())
    for axes, (name, counted) in zip(panels.flat, layers.items()):
        share = 100 * counted.counts[: most + 1] / counted.counts.sum()
        axes.bar(range(most + 1), share.numpy(), color=BLUE)
        axes.set_title(f"{layer_label(name)}: {counted.lowest} to {counted.highest}", fontsize="medium")
        axes.tick_params(labelsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("experts that took a token", fontsize="small")
    for axes in panels[:, 0]:
        axes.set_ylabel("tokens (%)", fontsize="small")
    return canvas


def chosen_slots(shares: Tensor, count: int) -> list[int]:
    """Numbers of the slots that draw from the fewest patches, over all images, the most selective first.

    Args:
        shares: (B, N, h, w) share of each patch in every slot.
        count: how many, at most.
    """
    shares = shares.flatten(2)
    shares = shares / shares.sum(2, keepdim=True)
    return effective_number(shares, 2).mean(0).argsort(stable=True)[:count].tolist()


def patch_shares(
    pictures: Tensor, rows: Sequence[tuple[str, Tensor]], class_names: Sequence[str], title: str
) -> Canvas:
    """Images in columns, under each how much of every patch is taken: from pale blue, none, to the full picture, most.

    Args:
        pictures: (B, H, W) grey or (B, H, W, 3) colours in 0..1.
        rows: (label, (B, h, w) at least 0); each map is drawn against its own largest value.
        class_names: (B,) names of the images' classes.
        title: of the figure.
    """
    if pictures.ndim == 3:
        pictures = pictures.unsqueeze(-1).expand(-1, -1, -1, 3)
    count, height, width = pictures.shape[:3]
    right, down = 1.07 * width, 1.07 * height
    canvas = Canvas(figsize=(1.5 + 0.95 * count, 0.9 + 0.95 * down / width * (len(rows) + 1)), layout="constrained")
    axes = canvas.add_subplot()
    lines = [("input", list(pictures))]
    lines += [(label, [_faded(*each) for each in zip(pictures, shares)]) for label, shares in rows]
    for row, (label, shown) in enumerate(lines):
        axes.text(-0.1 * width, row * down + height / 2, label, ha="right", va="center", fontsize=10)
        for column, picture in enumerate(shown):
            x, y = column * right, row * down
            axes.imshow(picture.numpy(), extent=(x, x + width, y + height, y), vmin=0, vmax=1)
    lettering = Lettering(class_names)
    for column, name in enumerate(class_names):
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "fontfamily": lettering.families}
        axes.text(column * right + width / 2, -0.08 * height, lettering.text(name, 13), **style)
    axes.set_xlim(-0.1 * width, count * right)
    axes.set_ylim(len(lines) * down, -0.25 * height)
    axes.set_axis_off()
    axes.set_title(title)
    return canvas


def _faded(picture: Tensor, shares: Tensor) -> Tensor:
    rows, columns = (torch.arange(size) * patches // size for size, patches in zip(picture.shape[:2], shares.shape))
    strength = (shares / shares.max().clamp(min=1e-12)).float()[rows][:, columns].unsqueeze(-1)
    return strength * picture + (1 - strength) * torch.tensor(HIDDEN)
