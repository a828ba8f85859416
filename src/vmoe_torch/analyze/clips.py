"""Which patches of which frames the experts process as the capacity falls: clips that play, and what a report says.

Dims: B clips of T frames of H x W pixels, t x h x w tokens.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from vmoe_torch.analyze.lettering import Lettering
from vmoe_torch.analyze.patches import ORDERS, KeptPatches, animation, coloured, hide, kept_patches_grid
from vmoe_torch.report import Figure, Section
from vmoe_torch.report.style import layer_label, percent, shorten

# Clips that play, and columns of a grid; of more, evenly spread ones.
MOST_CLIPS = 3
MOST_COLUMNS = 8
MOST_GRIDS = 4


def kept_clips_animation(
    patches: KeptPatches, layer: str, capacity_factors: Sequence[float], title: str, side: int = 88
) -> bytes:
    """A GIF that plays clips: two rows for each, vanilla and BPR, the capacity falling to the right.

    Patches that no expert processed are hidden under a flat pale blue; a patch of several frames in all of them.

    Args:
        patches: what was kept of clips; the first three are shown.
        layer: to show.
        capacity_factors: columns, of those in `patches`.
        title: above the clips.
        side: width of a picture in pixels.

    Returns:
        The file; a frame of it is one of the clips, and it repeats for ever.
    """
    count = patches.pictures.shape[1]
    frames = [_frame(patches, layer, time, capacity_factors, title, side) for time in range(count)]
    durations = [250] * count
    durations[-1] = 1000
    return animation(frames, durations, _evenly(frames, 4))


def _frame(
    patches: KeptPatches, layer: str, time: int, capacity_factors: Sequence[float], title: str, side: int
) -> Image.Image:
    clips = min(len(patches.class_names), MOST_CLIPS)
    pictures = coloured(patches.pictures[:clips, time])
    height, width = pictures.shape[1:3]
    tall, gap, left, top, foot = max(1, round(side * height / width)), 8, 78, 78, 18
    capacities = sorted(capacity_factors, reverse=True)
    block = len(ORDERS) * (tall + foot) + 2 * gap
    wide = max(left + (1 + len(capacities)) * (side + gap) + gap, 420)
    frame = Image.new("RGB", (wide, top + clips * block), "white")
    draw = ImageDraw.Draw(frame)
    path = findfont("DejaVu Sans")
    large, small = ImageFont.truetype(path, 15), ImageFont.truetype(path, 11)
    count = patches.pictures.shape[1]
    draw.text((gap, 8), shorten(title, frame.width // 9), "black", large)
    draw.text((gap, 30), f"frame {time + 1} of {count}", "black", large)
    for column, label in enumerate(["input", *(f"C = {capacity:g}" for capacity in capacities)]):
        draw.text((left + column * (side + gap) + side // 2, top - 6), label, "black", small, anchor="ms")
    lettering = Lettering(patches.class_names)
    moment = time * patches.kept[layer].shape[3] // count
    for clip in range(clips):
        y = top + clip * block
        name, font = lettering.for_pillow(patches.class_names[clip], 11, 12)
        draw.text((gap, y + tall // 2 - 9), name, "black", font, anchor="lm")
        _paste(frame, pictures[clip].numpy(), (left, y), (side, tall))
        for row, (_, order) in enumerate(ORDERS):
            below = y + row * (tall + foot)
            draw.text((gap, below + tall // 2 + 9), order, "black", small, anchor="lm")
            for column, capacity in enumerate(capacities, start=1):
                kept = patches.kept[layer][patches.capacity_factors.index(capacity), row, clip, moment] > 0
                x = left + column * (side + gap)
                _paste(frame, hide(pictures[clip], kept).numpy(), (x, below), (side, tall))
                text = f"{int(kept.sum())}/{kept.numel()}"
                draw.text((x + side // 2, below + tall + 2), text, "black", small, anchor="ma")
    return frame


def _paste(frame: Image.Image, picture: np.ndarray, place: tuple[int, int], size: tuple[int, int]) -> None:
    image = Image.fromarray((255 * picture).round().astype(np.uint8))
    enlarge = Image.Resampling.NEAREST if image.width < size[0] else Image.Resampling.BOX
    frame.paste(image.resize(size, enlarge), place)


def clip_section(patches: KeptPatches, capacity_factors: Sequence[float]) -> Section:
    """Which patches of which frames each capacity keeps: the last layer as clips that play, up to four as pictures.

    Args:
        patches: what was kept of clips.
        capacity_factors: to draw, of those in `patches`.
    """
    names = list(patches.kept)
    last, count = names[-1], len(patches.class_names)
    if patches.group_images == 1:
        group = "Every clip is a group of its own, with its own slots."
    elif patches.group_images == count:
        group = f"The {count} clips form one group and share its slots."
    else:
        group = f"Groups of {patches.group_images} clips share slots."
    title = f"Patches that the experts of {layer_label(last)} process"
    figures = [
        Figure(
            "clips",
            kept_clips_animation(patches, last, capacity_factors, title),
            f"{layer_label(last).capitalize()}, the capacity falling to the right. "
            f"{_kept_text(patches, last, capacity_factors)}",
            f"Clips that play, with the patches hidden that {layer_label(last)} does not process, vanilla and BPR",
        ),
        *(_grid(patches, name, capacity_factors) for name in _evenly(names, MOST_GRIDS)),
    ]
    return Section(
        "Which patches of which frames each capacity keeps",
        paragraphs=[
            f"{group} Below each picture stands how many of its patches at least one expert processed; pale blue "
            "patches skip the layer. Vanilla serves patches by position, those of the first frames first, so it is the "
            "end of a clip that is lost; BPR serves the patches with the largest gates of all frames first."
        ],
        figures=figures,
        wide=True,
    )


def _grid(patches: KeptPatches, name: str, capacity_factors: Sequence[float]) -> Figure:
    """The first clip, moment by moment."""
    frames, moments = patches.pictures.shape[1], patches.kept[name].shape[3]
    shown = _evenly(list(range(moments)), MOST_COLUMNS)
    first = [moment * frames // moments for moment in shown]
    rows = [
        (f"C = {capacity:g}\n{order}", patches.kept[name][patches.capacity_factors.index(capacity), number, 0, shown])
        for capacity in sorted(capacity_factors, reverse=True)
        for number, (_, order) in enumerate(ORDERS)
    ]
    title = f"Patches that the experts of {layer_label(name)} process"
    return Figure(
        f"clips_{name.replace('.', '_')}",
        kept_patches_grid(patches.pictures[0, first], rows, [f"frame {number + 1}" for number in first], title),
        f"{layer_label(name).capitalize()}, the first clip. {_kept_text(patches, name, capacity_factors)}",
        f"Frames of a clip with the dropped patches hidden, by capacity and order, in {layer_label(name)}",
    )


def _evenly(items: list, most: int) -> list:
    return items if len(items) <= most else [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _kept_text(patches: KeptPatches, layer: str, capacity_factors: Sequence[float]) -> str:
    """Numbers of the first and the last frames at the second smallest capacity drawn."""
    capacity = sorted(capacity_factors)[min(1, len(capacity_factors) - 1)]
    place = patches.capacity_factors.index(capacity)
    begin, end = (
        [percent(float((patches.kept[layer][place, row, :, moment] > 0).float().mean())) for row in range(len(ORDERS))]
        for moment in (0, -1)
    )
    return (
        f"At C = {capacity:g} vanilla processes {begin[0]} of the patches of the first frames and {end[0]} of the last "
        f"ones, BPR {begin[1]} and {end[1]}."
    )
