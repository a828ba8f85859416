"""Which patches of an image the experts process as the capacity falls: measured, drawn, and as an animation.

Dims: B images of H x W pixels, h x w patches.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset

from vmoe_torch.analyze.lettering import Lettering
from vmoe_torch.analyze.statistics import kept_choices_per_patch
from vmoe_torch.control import moe_layers, routing
from vmoe_torch.data import BrokenImageError
from vmoe_torch.report.style import HIDDEN, shorten

# Vanilla first; what `batch_priority` is, and what it is called.
ORDERS = ((False, "vanilla"), (True, "BPR"))


@dataclass(frozen=True)
class KeptPatches:
    """What every layer kept of a few images, at falling capacities."""

    pictures: Tensor
    """(B, H, W) grey or (B, H, W, 3) colours in 0..1, as the model sees them; of clips with T after B."""
    class_names: tuple[str, ...]
    """(B,) class of each image."""
    capacity_factors: tuple[float, ...]
    """Capacity factors asked for, falling."""
    group_images: int
    """How many of the images share slots."""
    kept: dict[str, Tensor]
    """{layer name: (capacities, 2, B, h, w)} kept choices of each patch, in the order of `ORDERS`; of clips with the
    layers in time after B."""

    def shares(self, layer: str, capacity: float, batch_priority: bool) -> list[float]:
        """Of every image, the share of patches that at least one expert processed."""
        place = self.capacity_factors.index(capacity)
        return (self.kept[layer][place, int(batch_priority)] > 0).float().flatten(1).mean(1).tolist()

    @property
    def of_clips(self) -> bool:
        """Whether these are clips of videos."""
        return next(iter(self.kept.values())).ndim == 6


def collect_kept_patches(
    model: nn.Module,
    dataset: Dataset,
    transform: Callable,
    class_names: Sequence[str],
    capacity_factors: Sequence[float],
    count: int = 8,
) -> KeptPatches:
    """Runs a few images, of different classes where there are, at every capacity, in both orders.

    Args:
        model: a VMoE; it keeps its routing.
        dataset: items (PIL image, label).
        transform: for evaluation, PIL image -> (C, H, W).
        class_names: by label.
        capacity_factors: to try.
        count: images to show.

    Raises:
        ValueError: if there is no image, or the model has no MoE layer to count.
    """
    chosen = different_classes(dataset, transform, count)
    tensors = torch.stack([image for image, _ in chosen])
    capacity_factors = tuple(sorted(set(capacity_factors), reverse=True))
    kept: dict[str, list[Tensor]] = {}
    for capacity in capacity_factors:
        for batch_priority, _ in ORDERS:
            with routing(model, capacity_factor=capacity, batch_priority=batch_priority):
                for name, patches in kept_choices_per_patch(model, tensors).items():
                    kept.setdefault(name, []).append(patches)
    return KeptPatches(
        pictures_of(tensors, transform),
        tuple(class_names[label] for _, label in chosen),
        capacity_factors,
        min(next(iter(moe_layers(model).values())).group_size or count, len(chosen)),
        {name: torch.stack(maps).unflatten(0, (-1, len(ORDERS))) for name, maps in kept.items()},
    )


def different_classes(dataset: Dataset, transform: Callable, count: int) -> list[tuple[Tensor, int]]:
    """The first images that each show another class, then the first others; only the first few hundred are read.

    Raises:
        ValueError: if there is no image.
    """
    first, others = {}, []
    for index in range(min(len(dataset), 40 * count)):
        try:
            image, label = dataset[index]
            image = transform(image)
        # Whoever reads all images counts and names it.
        except BrokenImageError:
            continue
        if label in first:
            others.append((image, label))
        else:
            first[label] = (image, label)
        if len(first) == count:
            break
    if not first:
        raise ValueError("dataset must hold at least one image, got none")
    return [*first.values(), *others][:count]


def pictures_of(tensors: Tensor, transform: Callable) -> Tensor:
    """What a model sees, to be looked at: its normalisation undone.

    Args:
        tensors: (B, C, H, W) that the transform made, C = 1 or 3, or (B, C, T, H, W) that a `ClipTransform` made.
        transform: one with `transforms`, the last of which that has `mean` and `std` is undone; without any, the
            smallest value becomes black and the largest white.

    Returns:
        (B, H, W) or (B, H, W, 3) in 0..1; of clips (B, T, H, W) or (B, T, H, W, 3).
    """
    if tensors.ndim == 5:
        frames = pictures_of(tensors.transpose(1, 2).flatten(0, 1), transform.image)
        return frames.unflatten(0, (len(tensors), -1))
    parts = [part for part in getattr(transform, "transforms", ()) if hasattr(part, "mean") and hasattr(part, "std")]
    if parts:
        mean, std = (torch.as_tensor(value).float().view(-1, 1, 1) for value in (parts[-1].mean, parts[-1].std))
        pictures = tensors * std + mean
    else:
        low, high = tensors.min(), tensors.max()
        pictures = (tensors - low) / (high - low).clamp(min=1e-12)
    pictures = pictures.clamp(0, 1).permute(0, 2, 3, 1)
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures


def kept_patches_grid(
    images: Tensor, rows: Sequence[tuple[str, Tensor]], class_names: Sequence[str], title: str
) -> Canvas:
    """Images in columns, settings in rows; patches that no expert processed are hidden under a flat pale blue.

    Args:
        images: (B, H, W) grey or (B, H, W, 3) colours in 0..1.
        rows: (label, (B, h, w) kept choices of each patch).
        class_names: (B,) names of the images' classes.
        title: of the figure.
    """
    pictures = coloured(images)
    lines = []
    for label, kept in rows:
        hidden = [hide(picture, patches > 0) for picture, patches in zip(pictures, kept)]
        lines.append((label, hidden, [f"{int((patches > 0).sum())}/{patches.numel()}" for patches in kept]))
    return picture_grid(pictures, lines, class_names, title)


def picture_grid(
    pictures: Tensor,
    rows: Sequence[tuple[str, Sequence[Tensor], Sequence[str]]],
    class_names: Sequence[str],
    title: str,
) -> Canvas:
    """Images in columns, and in rows what was made of them.

    Args:
        pictures: (B, H, W, 3) in 0..1, the first row.
        rows: (label, B pictures (H, W, 3), a short text below each).
        class_names: (B,) names of the images' classes.
        title: of the figure.
    """
    count, height, width = pictures.shape[:3]
    # One pair of axes with every picture in its own place is ten times as fast as axes for each.
    right, down = 1.07 * width, 1.0 * height + 0.2 * width
    canvas = Canvas(figsize=(1.5 + 0.95 * count, 0.9 + 0.9 * down / width * (len(rows) + 1)), layout="constrained")
    axes = canvas.add_subplot()
    lines = [("input", pictures, [""] * count), *rows]
    for row, (label, shown, texts) in enumerate(lines):
        axes.text(-0.1 * width, row * down + height / 2, label, ha="right", va="center", fontsize=10)
        for column, (picture, text) in enumerate(zip(shown, texts)):
            x, y = column * right, row * down
            axes.imshow(picture.numpy(), extent=(x, x + width, y + height, y), vmin=0, vmax=1)
            axes.text(x + width / 2, y + height + 0.02 * width, text, ha="center", va="top", fontsize=7)
    lettering = Lettering(class_names)
    for column, name in enumerate(class_names):
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "fontfamily": lettering.families}
        axes.text(column * right + width / 2, -0.08 * width, lettering.text(name, 13), **style)
    axes.set_xlim(-0.1 * width, count * right)
    axes.set_ylim(len(lines) * down, -0.25 * width)
    axes.set_axis_off()
    axes.set_title(title)
    return canvas


def coloured(images: Tensor) -> Tensor:
    """(B, H, W, 3) float32 of images that are grey (B, H, W) or coloured."""
    return (images if images.ndim == 4 else images.unsqueeze(-1).expand(-1, -1, -1, 3)).float()


def hide(picture: Tensor, processed: Tensor) -> Tensor:
    """Puts a flat colour over every patch that is not processed.

    Args:
        picture: (H, W, 3) in 0..1.
        processed: (h, w) bool.
    """
    rows, columns = (torch.arange(size) * patches // size for size, patches in zip(picture.shape[:2], processed.shape))
    return torch.where(processed[rows][:, columns].unsqueeze(-1), picture, torch.tensor(HIDDEN))


def kept_patches_animation(patches: KeptPatches, layer: str, title: str, side: int = 104) -> bytes:
    """A GIF over falling capacities: vanilla in the upper row, BPR in the lower one.

    Args:
        patches: what was kept; one frame for each of its capacities.
        layer: to show.
        title: above the frames.
        side: width of a picture in pixels.

    Returns:
        The file; it repeats for ever.
    """
    frames = [_frame(patches, layer, place, title, side) for place in range(len(patches.capacity_factors))]
    durations = [450] * len(frames)
    durations[0] = durations[-1] = 1600
    # Those with most and with least to see have all the colours.
    return animation(frames, durations, [frames[0], frames[-1]])


def animation(frames: Sequence[Image.Image], durations: Sequence[int], coloured_as: Sequence[Image.Image]) -> bytes:
    """A GIF that repeats for ever.

    Args:
        frames: in colour, of one size.
        durations: of each, in milliseconds.
        coloured_as: frames that the palette of all is made of, or colours would flicker.
    """
    width, height = frames[0].size
    samples = Image.new("RGB", (width, len(coloured_as) * height))
    for number, frame in enumerate(coloured_as):
        samples.paste(frame, (0, number * height))
    palette = samples.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    # The page's white, which a mean of light colours is not.
    colours[(colours > 245).all(1)] = 255
    palette.putpalette(colours.flatten().tolist())
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=list(durations), loop=0, disposal=1)
    return data.getvalue()


def _frame(patches: KeptPatches, layer: str, place: int, title: str, side: int) -> Image.Image:
    pictures = coloured(patches.pictures)
    count, height, width = pictures.shape[:3]
    tall, gap, left, top, foot = max(1, round(side * height / width)), 8, 88, 78, 20
    size = (left + count * (side + gap) + gap, top + len(ORDERS) * (tall + foot + gap))
    frame = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(frame)
    path = findfont("DejaVu Sans")
    large, small = ImageFont.truetype(path, 16), ImageFont.truetype(path, 12)
    capacity = patches.capacity_factors[place]
    draw.text((gap, 8), shorten(title, size[0] // 10), "black", large)
    draw.text((gap, 32), f"capacity factor C = {capacity:.2f}", "black", large)
    # A bar for C, as long as the pictures at the largest one.
    full = size[0] - 3 * gap - 240
    draw.rectangle((240, 35, 240 + full, 47), outline="#6E6E6E")
    draw.rectangle((240, 35, 240 + round(full * capacity / patches.capacity_factors[0]), 47), fill="#0072B2")
    lettering = Lettering(patches.class_names)
    for column, name in enumerate(patches.class_names):
        x = left + column * (side + gap) + side // 2
        text, font = lettering.for_pillow(name, 14, 12)
        draw.text((x, top - 4), text, "black", font, anchor="ms")
    for row, (_, order) in enumerate(ORDERS):
        y = top + row * (tall + foot + gap)
        draw.text((gap, y + tall // 2), order, "black", large, anchor="lm")
        for column, (picture, kept) in enumerate(zip(pictures, patches.kept[layer][place, row])):
            x = left + column * (side + gap)
            shown = (255 * hide(picture, kept > 0).numpy()).round().astype(np.uint8)
            enlarge = Image.Resampling.NEAREST if width < side else Image.Resampling.BOX
            frame.paste(Image.fromarray(shown).resize((side, tall), enlarge), (x, y))
            text = f"{int((kept > 0).sum())}/{kept.numel()}"
            draw.text((x + side // 2, y + tall + 3), text, "black", small, anchor="ma")
    return frame
