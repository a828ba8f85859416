"""The measured numbers as pictures: models, the MoE layer, and how its cost grows. Bars and points are medians,
whiskers reach from the 20% to the 80% quantile.
"""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.harness.protocol import Samples, exponent
from benchmarks.harness.results import Row, machine_name
from benchmarks.harness.session import Session

# Okabe and Ito's, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
_MODEL_COLOURS = {"ours": BLUE, "ours, nothing dropped": GREEN, "dense": GREY}
_MODEL_NAMES = {
    "ours": "V-MoE, K=1, C=1",
    "ours, nothing dropped": "V-MoE, K=1, none dropped",
    "dense": "dense ViT",
}
_PANELS = {
    "T": "tokens per batch, T",
    "E": "experts, E (equal rows)",
    "K": "experts per token, K",
    "C": "capacity factor, C",
}
_RANKS = (
    ("ranks, experts at home", ORANGE, "s", "all experts in every process"),
    ("ranks, experts spread", BLUE, "o", "experts spread over processes"),
)


def write_plots(session: Session, layer_rows: Iterable[Row], folder: Path) -> None:
    """Writes what was measured as PNGs, and their names into the session."""
    title = machine_name(session.device)
    figures = {
        "models": models(session, title),
        "layer": layer(list(layer_rows), title),
        "scaling": scaling(session, title),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=130)
            session.pictures.append(f"{name}.png")


def models(session: Session, title: str) -> Figure | None:
    """Images per second by kind of step, the models side by side."""
    steps: dict[str, dict[str, Samples]] = {}
    images = 0
    for (op, direction, case, variant), samples in session.samples.items():
        if op in ("model", "train_step"):
            images = int(case.split()[0].removeprefix("B="))
            kind = "inference" if direction == "forward" else "forward + backward"
            kind = "training step,\nAdamW" if op == "train_step" else kind
            kind += ",\ncompiled" if case.endswith("compiled") else ""
            steps.setdefault(kind, {})[variant] = samples
    if not steps:
        return None
    steps = dict(sorted(steps.items(), key=lambda item: [word in item[0] for word in ("compiled", "AdamW", "back")]))
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name in _MODEL_COLOURS if any(name in of_step for of_step in steps.values())]
    width = 0.8 / len(names)
    for at, name in enumerate(names):
        places = [
            step + (at - (len(names) - 1) / 2) * width for step, each in enumerate(steps.values()) if name in each
        ]
        rates = [[images / each[name].quantile(q) for q in (0.5, 0.8, 0.2)] for each in steps.values() if name in each]
        heights = [rate[0] for rate in rates]
        whiskers = [[rate[0] - rate[1] for rate in rates], [rate[2] - rate[0] for rate in rates]]
        drawn = axes.bar(places, heights, 0.92 * width, color=_MODEL_COLOURS[name], label=_MODEL_NAMES[name])
        axes.errorbar(places, heights, whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        axes.bar_label(drawn, [f"{height:.0f}" for height in heights], label_type="center", color="white", fontsize=9)
    axes.set_xticks(range(len(steps)), list(steps))
    axes.set_ylabel("images per second")
    axes.set_title(f"Models of equal dims, batch of {images}: {title}", fontsize=11)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def layer(rows: list[Row], title: str) -> Figure | None:
    """Times of the MoE layer and its opponents at the first shape measured, a panel for each direction."""
    rows = [row for row in rows if row.op == "moe_layer" and not row.variant.startswith("matmul")]
    # A variant that was measured twice, with other opponents beside it, is shown once.
    rows = list({(row.case, row.direction, row.variant): row for row in reversed(rows)}.values())[::-1]
    if not rows:
        return None
    case = rows[0].case
    shown = {way: [row for row in rows if (row.direction, row.case) == (way, case)] for way in ("forward", "both")}
    longest = max(len(each) for each in shown.values())
    figure = Figure(figsize=(8.4, 1.6 + 0.34 * longest), layout="constrained")
    for axes, (way, of_way) in zip(figure.subplots(1, 2), shown.items()):
        of_way = of_way[::-1]
        ours = [row.variant == "ours" or row.variant.startswith("MoeMlp") for row in of_way]
        times = [row.median_us * 1e-3 for row in of_way]
        whiskers = [
            [(row.median_us - row.low_us) * 1e-3 for row in of_way],
            [(row.high_us - row.median_us) * 1e-3 for row in of_way],
        ]
        axes.barh(range(len(of_way)), times, 0.7, color=[BLUE if mine else GREY for mine in ours])
        axes.errorbar(times, range(len(of_way)), xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        axes.set_yticks(range(len(of_way)), [row.variant for row in of_way])
        axes.set_xlabel("milliseconds")
        axes.set_title("forward" if way == "forward" else "forward + backward", fontsize=10)
        _plain(axes)
    figure.suptitle(f"MoE layer, {case}: {title}", fontsize=11)
    return figure


def scaling(session: Session, title: str) -> Figure | None:
    """Time of the layer's forward over T, E, K and C, and over processes that share its experts."""
    names = [name for name in _PANELS if name in session.sweeps]
    ranks = [each for each in _RANKS if each[0] in session.sweeps]
    if not names and not ranks:
        return None
    count = len(names) + bool(ranks)
    figure = Figure(figsize=(4.2 * min(count, 3), 3.5 * -(-count // 3)), layout="constrained")
    panels = list(figure.subplots(-(-count // 3), min(count, 3), squeeze=False).flat)
    for axes, name in zip(panels, names):
        sweep = session.sweeps[name]
        _line(axes, sweep, BLUE, "o", "measured")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(_PANELS[name])
        if name == "T":
            axes.set_yscale("log")
            slope, values = exponent(sweep).median, list(sweep)
            through = sweep[values[-1]].median * 1e3
            axes.plot(
                values,
                [through * (value / values[-1]) for value in values],
                color=GREY,
                linestyle="--",
                label="linear",
            )
            axes.set_title(f"time grows as T^{slope:.2f}", fontsize=10)
            axes.legend(frameon=False)
        _ticks(axes, list(sweep))
    if ranks:
        axes = panels[len(names)]
        for name, colour, marker, label in ranks:
            _line(axes, session.sweeps[name], colour, marker, label)
        _ticks(axes, list(session.sweeps[ranks[0][0]]))
        axes.set_xlabel("processes, equal images each")
        axes.set_title("forward + backward, one thread each", fontsize=10)
        axes.legend(frameon=False)
    figure.suptitle(f"MoE layer, eval forward: {title}", fontsize=11)
    for axes in panels[count:]:
        axes.remove()
    return figure


def _line(axes: Axes, sweep: dict[float, Samples], colour: str, marker: str, label: str) -> None:
    medians = [each.median * 1e3 for each in sweep.values()]
    below = [(each.median - each.quantile(0.2)) * 1e3 for each in sweep.values()]
    above = [(each.quantile(0.8) - each.median) * 1e3 for each in sweep.values()]
    axes.errorbar(list(sweep), medians, [below, above], color=colour, marker=marker, capsize=3, label=label)
    axes.set_ylabel("milliseconds")
    _plain(axes)


def _ticks(axes: Axes, values: list[float]) -> None:
    """The measured values alone, and times from 0 on where they are not logarithms."""
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
