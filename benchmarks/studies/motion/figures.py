"""The study's figures, and the animation of what is left of a clip as the capacity falls."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import Subset
from torchvision.transforms import Compose, Normalize

from benchmarks.studies.motion import runs
from benchmarks.studies.motion.draw import MOTIONS
from benchmarks.studies.motion.measure import RESULT
from benchmarks.studies.motion.report import run_of
from vmoe_torch.analyze import KeptPatches, collect_kept_patches, kept_clips_animation, kept_patches_grid
from vmoe_torch.report.style import BLUE, GREEN, GREY, ORANGE, layer_label

COLOURS = {"video": ORANGE, "frames": GREY, "dense": BLUE, "inflated": GREEN}
# Motions of the clips that play, and the capacities at which they do.
SHOWN = ("right", "clockwise", "reveal")
SHOWN_CAPACITIES = (1.05, 0.5, 0.25)
# Of the glyphs of the test faces: letters and faces that differ.
GLYPHS = (1, 20, 27)


def write(found: Sequence[dict], folder: Path, out: Path) -> None:
    """Writes motion_*.{png,gif}, those that the finished runs allow; some need the folder of the runs."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn(found).items():
        figure.savefig(out / f"motion_{name}.png", dpi=150)
    if run_of(found, "video") is None or not (folder / "video" / RESULT).exists():
        return
    patches = kept(folder)
    layer = next(reversed(patches.kept))
    title = f"Patches that the experts of {layer_label(layer)} process"
    (out / "motion_kept.gif").write_bytes(kept_clips_animation(patches, layer, SHOWN_CAPACITIES, title))
    grid(patches, layer, title).savefig(out / "motion_kept.png", dpi=150)


def drawn(found: Sequence[dict]) -> dict[str, Figure]:
    """Figures by name that need the results alone."""
    made = {"accuracy": accuracy(found), "capacity": capacity(found)}
    return {name: figure for name, figure in made.items() if figure is not None}


def accuracy(found: Sequence[dict]) -> Figure | None:
    """Motions told right, by motion, a bar for each model."""
    if not found:
        return None
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.subplots()
    wide, places = 0.8 / len(found), np.arange(len(MOTIONS))
    for number, run in enumerate(found):
        heights = [100 * share for share in run["test"]["by_motion"]]
        left = places - 0.4 + wide * (number + 0.5)
        axes.bar(left, heights, wide, color=COLOURS[run["name"]], label=run["title"])
    axes.axhline(50, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(places, MOTIONS, fontsize="small")
    axes.set_ylim(0, 100)
    axes.set_ylabel("motions told right, %")
    axes.set_title("Which way did it move? Typefaces never seen", fontsize="medium")
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=2)
    return figure


def capacity(found: Sequence[dict]) -> Figure | None:
    """The video V-MoE over its FLOPs as the capacity falls, vanilla and BPR; the dense one as a point."""
    video = run_of(found, "video")
    if video is None:
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for priority, colour, label in ((False, GREY, "vanilla"), (True, ORANGE, "BPR")):
        rows = [row for row in video["capacities"] if row["batch_priority"] == priority]
        points = [(row["flops"] / 1e6, 100 * row["motion"]) for row in rows]
        axes.plot(*zip(*points), color=colour, marker="o", label=f"video V-MoE, {label}")
        for row, place in zip(rows, points):
            if priority:
                axes.annotate(
                    f"C={row['capacity_factor']:g}",
                    place,
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize="x-small",
                )
    if (dense := run_of(found, "dense")) is not None:
        place = dense["flops"] / 1e6, 100 * dense["test"]["motion"]
        axes.plot(*place, color=BLUE, marker="s", linestyle="none", label=dense["title"])
    axes.set_xlabel("MFLOPs per clip")
    axes.set_ylabel("motions told right, %")
    axes.set_title("Less capacity, same weights", fontsize="medium")
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.5, high + 1.5)
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def kept(folder: Path) -> KeptPatches:
    """Which patches of a few test clips the video V-MoE processes at each capacity."""
    model = runs.trained(runs.RUNS[0], folder)
    clips = runs.clips_of(folder, "test")
    chosen = Subset(clips, [clips.number(glyph, MOTIONS.index(motion)) for glyph, motion in zip(GLYPHS, SHOWN)])
    return collect_kept_patches(model, chosen, _AsInput(), clips.class_names, SHOWN_CAPACITIES, len(chosen))


class _AsInput:
    """A clip (T, S, S) as a model takes it, and what is undone for it to be looked at."""

    image = Compose([Normalize(runs.MEAN, runs.STD)])

    def __call__(self, clip: np.ndarray) -> torch.Tensor:
        return runs.as_input(clip[None])[0]


def grid(patches: KeptPatches, layer: str, title: str) -> Figure:
    """The first clip, tubelet by tubelet."""
    times = patches.kept[layer].shape[3]
    first = [time * patches.pictures.shape[1] // times for time in range(times)]
    rows = [
        (f"C = {factor:g}\n{order}", patches.kept[layer][place, number, 0])
        for place, factor in enumerate(patches.capacity_factors)
        for number, order in enumerate(("vanilla", "BPR"))
    ]
    return kept_patches_grid(patches.pictures[0, first], rows, [f"frame {number + 1}" for number in first], title)
