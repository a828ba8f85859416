"""The study's figures."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.studies.typefaces.measure import ROUTING
from benchmarks.studies.typefaces.report import at_budgets, at_setting, of
from benchmarks.studies.typefaces.runs import CLASSES, SIZES, SPARSE_SIZES
from vmoe_torch.report.style import BLUE, GREEN, GREY, ORANGE, layer_label

# Whose experts are shown.
SHOWN_RUN = "sparse_middle_0"
# At most so many of the last layer's experts have a row of characters, evenly chosen by number.
SHOWN_EXPERTS = 16


def drawn(found: Sequence[dict], runs: Path) -> dict[str, Figure]:
    """Figures by file name, those that the finished runs allow; some need the folder of the runs."""
    made = {
        "training_flops": training_flops(found),
        "capacity": capacity(found),
        "experts": experts(found, runs),
        "specialists": specialists(found, runs),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _top1(runs: Sequence[dict]) -> tuple[float, float]:
    """Mean and spread of the test accuracy in per cent."""
    top1 = [100 * run["test"]["all"] for run in runs]
    return statistics.mean(top1), statistics.stdev(top1) if len(top1) > 1 else 0.0


def training_flops(found: Sequence[dict]) -> Figure | None:
    """Accuracy on unseen typefaces over the FLOPs of the training, and over those of an image as capacity falls.

    The former with the spread of the seeds, the latter of the first.
    """
    kinds = {"sparse": "sparse", "dense_flops": "dense"}
    lines = {name: [of(found, kind, size, f"{name}_{size}") for size in SIZES] for name, kind in kinds.items()}
    if not all(all(runs) for runs in lines.values()):
        return None
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    training, inference = figure.subplots(1, 2, sharey=True)
    for (prefix, runs), colour, label in zip(lines.items(), (ORANGE, BLUE), ("V-MoE", "dense ViT")):
        top1, error = zip(*map(_top1, runs))
        style = {"color": colour, "marker": "o", "capsize": 3, "label": label}
        training.errorbar([own[0]["training_flops"] / 1e12 for own in runs], top1, yerr=error, **style)
        for size, own, height in zip(SIZES, runs, top1):
            place = own[0]["training_flops"] / 1e12, height
            offset = (-6, 8) if prefix == "sparse" else (6, -14)
            training.annotate(size, place, offset, textcoords="offset points", color=colour, fontsize="small")
    for kind, colour, label in (("sparse", ORANGE, "V-MoE"), ("dense", BLUE, "dense ViT")):
        style = {"color": colour, "marker": "o", "fillstyle": "none", "linestyle": "none"}
        places = [
            (run["training_flops"] / 1e12, 100 * run["test"]["all"])
            for run in of(found, kind, "middle", f"{kind}_twice")
        ]
        if places:
            training.plot(*zip(*places), **style, label=f"{label}, middle, for twice as long")
    for run in (dense := [own[0] for own in lines["dense_flops"]]):
        inference.plot(run["forward_flops"] / 1e6, 100 * run["test"]["all"], color=BLUE, marker="o")
    inference.plot([r["forward_flops"] / 1e6 for r in dense], [100 * r["test"]["all"] for r in dense], color=BLUE)
    for run in (own[0] for size in SPARSE_SIZES if (own := of(found, "sparse", size, f"sparse_{size}"))):
        # Both orders are known of the middle size alone.
        said = run["size"] == "middle"
        trained = [(run["forward_flops"] / 1e6, 100 * run["test"]["all"])]
        budgets = [(row["flops"] / 1e6, 100 * row["top1"]) for row in run["budgets"].values()]
        for points, colour, style, label in (
            (_falling(run, False), GREY, "--", "V-MoE, less and less capacity, vanilla"),
            (_falling(run, True), ORANGE, "--", "the same with BPR"),
            (sorted(trained + budgets), ORANGE, "-", "V-MoE as trained, and by set_budget"),
        ):
            if points:
                inference.plot(*zip(*points), color=colour, linestyle=style, marker=".", label=label if said else None)
        inference.plot(*trained[0], color=ORANGE, marker="o")
        style = {"color": ORANGE, "fontsize": "small", "ha": "center"}
        inference.annotate(run["size"], trained[0], (0, 8), textcoords="offset points", **style)
    inference.set_xlabel("MFLOPs of an image at inference")
    training.set_xlabel("TFLOPs of the training")
    training.set_ylabel("top-1 on unseen typefaces, %")
    # Room for the names beside and above the last points.
    training.margins(x=0.12, y=0.1)
    for axes in (training, inference):
        axes.set_xscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize="small", loc="lower right")
        axes.xaxis.set_major_formatter(_plain)
        axes.xaxis.set_minor_formatter(_plain)
        axes.tick_params(axis="x", which="both", labelsize="small")
    seeds = max(len(own) for runs in lines.values() for own in runs)
    for axes, told in ((training, f"mean and spread of {seeds} seeds at the middle size"), (inference, "first seed")):
        axes.set_title(told, fontsize="small")
    figure.suptitle(f"{CLASSES:,} characters in typefaces never seen", fontsize="medium")
    return figure


def _plain(value: float, _position: int | None = None) -> str:
    """A tick's label: powers of ten, and twice and five times them."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _falling(run: dict, order: bool) -> list[tuple[float, float]]:
    """(MFLOPs of an image, top-1 in per cent) as capacity falls, of the K that was trained."""
    selected = max(row["num_selected_experts"] for row in run["settings"])
    own = (row for row in run["settings"] if (row["num_selected_experts"], row["batch_priority"]) == (selected, order))
    return sorted((row["flops"] / 1e6, 100 * row["top1"]) for row in own)


def capacity(found: Sequence[dict]) -> Figure | None:
    """The middle V-MoE over its FLOPs as its capacity falls, vanilla and BPR, and the dense ViT as a point.

    Both of the first seed, whose V-MoE alone was asked for every setting.
    """
    sparse = of(found, "sparse", "middle", "sparse_middle")[:1]
    seeds = [run["seed"] for run in sparse]
    dense = [run for run in of(found, "dense", "middle", "dense_middle") if run["seed"] in seeds]
    if not dense:
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    places = dict.fromkeys((row["num_selected_experts"], row["batch_priority"]) for row in sparse[0]["settings"])
    factors = dict.fromkeys(row["capacity_factor"] for row in sparse[0]["settings"])
    for selected, order in places:
        points = sorted(_mean(at_setting(sparse, selected, factor, order)) for factor in factors)
        axes.plot(
            *zip(*points),
            color=ORANGE if order else GREY,
            marker="o",
            markersize=4,
            linestyle="-" if selected == max(k for k, _ in places) else "--",
            label=f"{'BPR' if order else 'vanilla'}, K={selected}",
        )
    chosen = [_mean(rows) for rows in at_budgets(sparse).values()]
    trained = sparse[0]["forward_flops"] / 1e6, statistics.mean(100 * run["test"]["all"] for run in sparse)
    axes.plot(*zip(*sorted([*chosen, trained])), color=GREEN, marker="o", markersize=4, label="by set_budget, BPR")
    level = statistics.mean(100 * run["test"]["all"] for run in dense)
    axes.axhline(level, color=BLUE, linewidth=1, linestyle=":")
    axes.plot([dense[0]["forward_flops"] / 1e6], [level], color=BLUE, marker="s", linestyle="none", label="dense ViT")
    axes.set_xlabel("MFLOPs per image")
    axes.set_ylabel("top-1 on unseen typefaces, %")
    axes.set_title("Less capacity, same weights (first seed)", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def _mean(rows: Sequence[dict]) -> tuple[float, float]:
    """(MFLOPs of an image, mean top-1 in per cent) of one setting's rows."""
    return rows[0]["flops"] / 1e6, statistics.mean(100 * row["top1"] for row in rows)


def experts(found: Sequence[dict], runs: Path) -> Figure | None:
    """Experts by character in the first and the last MoE layer, each layer's characters sorted by their expert."""
    arrays = _routing(found, runs)
    if arrays is None:
        return None
    layers = next(run for run in found if run["name"] == SHOWN_RUN)["routing"]
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    names = next(iter(layers)), next(reversed(layers))
    for axes, name, counts in zip(panels, names, (arrays["first"], arrays["last"])):
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        order = np.lexsort((-shares.max(1), shares.argmax(1)))
        image = axes.imshow(shares[order].T, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
        bits = layers[name]["character"]["bits"]
        axes.set_title(f"{layer_label(name)}: {bits:.2f} bits of the character", fontsize="small")
        axes.set_xlabel("characters, sorted by their expert", fontsize="small")
        figure.colorbar(image, ax=axes, label="share of a character's tokens")
    panels[0].set_ylabel("expert", fontsize="small")
    return figure


def specialists(found: Sequence[dict], runs: Path) -> Figure | None:
    """What the experts of the last MoE layer are sure of: their patches, and the characters that use them most."""
    arrays = _routing(found, runs)
    if arrays is None:
        return None
    images, places, glyphs = arrays["images"], arrays["places"], arrays["glyphs"]
    shares = arrays["last"] / arrays["last"].sum(1, keepdims=True).clip(min=1)
    experts = range(0, len(places), -(-len(places) // SHOWN_EXPERTS))
    count = places.shape[1]
    patch = SIZES["middle"].patch
    columns = images.shape[-1] // patch
    size, gap = images.shape[-1] + 4, 12
    canvas = np.ones((len(experts) * size, 2 * count * size + gap, 3))
    for line, expert in enumerate(experts):
        favourites = np.argsort(-shares[:, expert], kind="stable")[:count]
        for column in range(count):
            place = places[expert, column]
            if place >= 0:
                tile = np.repeat(1 - images[expert, column, :, :, None] / 255, 3, axis=2)
                tile = 0.55 + 0.45 * tile
                row, left = place // columns * patch, place % columns * patch
                inside = np.s_[row : row + patch, left : left + patch]
                ink = images[expert, column][inside][..., None] / 255
                tile[inside] = (1 - ink) * np.array([1.0, 0.86, 0.72]) + ink * np.array([0.75, 0.2, 0.0])
                _paste(canvas, tile, line * size, column * size)
            glyph = np.repeat(1 - glyphs[favourites[column], :, :, None] / 255, 3, axis=2)
            _paste(canvas, glyph, line * size, (count + column) * size + gap)
    figure = Figure(figsize=(10, 10 * len(experts) / (2 * count) + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks([(line + 0.5) * size for line in range(len(experts))], map(str, experts))
    axes.set_xticks(
        [count * size / 2, 1.5 * count * size + gap], ["the patches it is surest of", "the characters that use it most"]
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylabel("expert of the last MoE layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _paste(canvas: np.ndarray, tile: np.ndarray, top: int, left: int) -> None:
    canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile


def _routing(found: Sequence[dict], runs: Path) -> dict[str, np.ndarray] | None:
    """What the shown run kept for figures; None where it is not finished, or its folder is not here."""
    file = runs / SHOWN_RUN / ROUTING
    if not file.exists() or not any(run["name"] == SHOWN_RUN for run in found):
        return None
    with np.load(file) as arrays:
        return dict(arrays)
