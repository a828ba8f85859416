"""How many experts each token has, where a threshold decides: a histogram, and maps over the image.

Dims: B images of H x W pixels, h x w patches, K choices per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vmoe_torch.analyze.patches import coloured, different_classes, picture_grid, pictures_of
from vmoe_torch.analyze.statistics import LayerRouting, kept_choices_per_patch
from vmoe_torch.report import Figure, Section
from vmoe_torch.report.style import layer_label, percent

# How much of a patch's colour says its number of experts; the rest is the picture in grey.
OPACITY = 0.55


@dataclass(frozen=True)
class PatchExperts:
    """How many experts processed each patch of a few images, at the routing that is set."""

    pictures: Tensor
    """(B, H, W) grey or (B, H, W, 3) colours in 0..1, as the model sees them."""
    class_names: tuple[str, ...]
    """(B,) class of each image."""
    most: int
    """K, the largest number there may be."""
    numbers: dict[str, Tensor]
    """{layer name: (B, h, w) int64 in 0..K}."""


def collect_patch_experts(
    model: nn.Module, dataset: Dataset, transform: Callable, class_names: Sequence[str], count: int = 8
) -> PatchExperts:
    """Runs a few images, of different classes where there are.

    Args:
        model: a VMoE.
        dataset: items (PIL image, label).
        transform: for evaluation, PIL image -> (C, H, W).
        class_names: by label.
        count: images to show.

    Raises:
        ValueError: if there is no image, or the model has no MoE layer to count.
    """
    chosen = different_classes(dataset, transform, count)
    tensors = torch.stack([image for image, _ in chosen])
    numbers = kept_choices_per_patch(model, tensors)
    most = max(module.num_selected_experts for module in model.modules() if hasattr(module, "num_selected_experts"))
    names = tuple(class_names[label] for _, label in chosen)
    return PatchExperts(pictures_of(tensors, transform), names, most, numbers)


def experts_per_token(routings: dict[str, LayerRouting]) -> Canvas:
    """The shares of tokens with 0 to K experts, one bar for each layer.

    Args:
        routings: {layer name: routing}, from the first layer to the last.
    """
    canvas = Canvas(figsize=(6.4, 1.3 + 0.36 * len(routings)), layout="constrained")
    axes = canvas.add_subplot()
    most = max(len(routing.numbers) for routing in routings.values()) - 1
    colours = _colours(most)
    for place, routing in enumerate(routings.values()):
        left = 0.0
        for number, share in enumerate((routing.numbers / routing.numbers.sum().clamp(min=1)).tolist()):
            axes.barh(place, 100 * share, left=100 * left, color=colours[number], edgecolor="white", linewidth=0.5)
            if share >= 0.06:
                ink = "black" if sum(colours[number]) > 1.4 else "white"
                where = {"ha": "center", "va": "center", "fontsize": "small", "color": ink}
                axes.text(100 * (left + share / 2), place, f"{100 * share:.0f}", **where)
            left += share
    axes.set_yticks(range(len(routings)), [layer_label(name) for name in routings])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the tokens, %")
    _add_legend(canvas, colours)
    return canvas


def experts_per_patch(patches: PatchExperts, layers: Sequence[str], title: str) -> Canvas:
    """Images in columns, layers in rows; a patch's colour is the number of its experts, below stands the mean.

    Args:
        patches: what was counted.
        layers: names of those to draw.
        title: of the figure.
    """
    pictures = coloured(patches.pictures)
    colours = torch.tensor(_colours(patches.most))
    rows = []
    for name in layers:
        numbers = patches.numbers[name]
        shown = [_tinted(picture, colours[number]) for picture, number in zip(pictures, numbers)]
        rows.append((layer_label(name), shown, [f"{float(number.float().mean()):.2f}" for number in numbers]))
    canvas = picture_grid(pictures, rows, patches.class_names, title)
    _add_legend(canvas, colours.tolist())
    return canvas


def _colours(most: int) -> list[tuple[float, float, float]]:
    """Of 0 to K experts, dark to light."""
    return [tuple(matplotlib.colormaps["cividis"](number / max(most, 1))[:3]) for number in range(most + 1)]


def _tinted(picture: Tensor, colours: Tensor) -> Tensor:
    """A picture (H, W, 3) in grey under the colours (h, w, 3) of its patches."""
    rows, columns = (torch.arange(size) * patches // size for size, patches in zip(picture.shape[:2], colours.shape))
    grey = picture.mean(-1, keepdim=True)
    return (1 - OPACITY) * grey + OPACITY * colours[rows][:, columns]


def _add_legend(canvas: Canvas, colours: Sequence[Sequence[float]]) -> None:
    words = [f"{number} expert{'' if number == 1 else 's'}" for number in range(len(colours))]
    handles = [Patch(color=tuple(colour), label=word) for colour, word in zip(colours, words)]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(words), fontsize="small", frameon=False)


def number_section(routings: dict[str, LayerRouting], patches: PatchExperts | None, layers: int = 4) -> Section | None:
    """How many experts tokens and patches get; None where no threshold decides.

    Args:
        routings: {layer name: routing}.
        patches: of a few images.
        layers: how many are drawn; of more, evenly spread ones.
    """
    if patches is None:
        return None
    names = list(patches.numbers)
    shown = (
        names if len(names) <= layers else [names[round(i * (len(names) - 1) / (layers - 1))] for i in range(layers)]
    )
    means = {name: _mean(routing.numbers) for name, routing in routings.items()}
    fewest, most = min(means, key=means.get), max(means, key=means.get)
    images = torch.stack([number.float().mean((1, 2)) for number in patches.numbers.values()]).mean(0)
    low, high = int(images.argmin()), int(images.argmax())
    skipped = {name: routing.unprocessed / max(routing.tokens, 1) for name, routing in routings.items()}
    passed = max(skipped, key=skipped.get)
    return Section(
        "How many experts a token gets",
        paragraphs=[
            f"A token keeps the choices whose gates reach the layer's threshold: from none to {patches.most} experts. "
            f"Over all tokens the mean is {means[fewest]:.2f} in {layer_label(fewest)} and {means[most]:.2f} in "
            f"{layer_label(most)}; most tokens without an expert has {layer_label(passed)}, "
            f"{percent(skipped[passed])}."
        ],
        figures=[
            Figure(
                "numbers",
                experts_per_token(routings),
                "Tokens by the number of experts that processed them, layer by layer.",
                "Bars of the shares of tokens with none to K experts, for each layer of experts",
            ),
            Figure(
                "number_maps",
                experts_per_patch(patches, shown, "How many experts process each patch"),
                f"Below each picture stands the mean over its patches. Over all layers it is least for the image of "
                f"class {patches.class_names[low]}, {float(images[low]):.2f}, and largest for the one of class "
                f"{patches.class_names[high]}, {float(images[high]):.2f}.",
                "Grid of images whose patches are coloured by their number of experts, by layer",
            ),
        ],
        wide=True,
    )


def _mean(numbers: Tensor) -> float:
    return float((numbers * torch.arange(len(numbers))).sum() / numbers.sum().clamp(min=1))
