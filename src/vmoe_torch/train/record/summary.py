"""summary.html of a run folder: how the training went, in curves, from the files that the run writes."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from vmoe_torch.report import Figure, Report, Section, Table, write_report
from vmoe_torch.report.style import BLUE, GREEN, ORANGE, layer_label
from vmoe_torch.train.record.table import read_table

LINKED = ("config.json", "environment.json", "metrics.csv", "progress.csv", "routing.csv", "alarms.csv")
MOST_ALARMS = 50
# Columns of the heat maps; more log points are averaged.
MOST_COLUMNS = 400


def write_summary(folder: Path) -> Path:
    """Writes summary.html into a run folder, whole or not at all; returns its path."""
    epochs, points, routing, alarms = (
        read_table(folder / f"{name}.csv") for name in ("metrics", "progress", "routing", "alarms")
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    sections = [_facts(config, environment, epochs), _alarms(alarms), _curves(epochs, points)]
    if routing:
        sections.append(_routing(routing))
    if epochs:
        sections.append(_epochs(epochs))
    report = Report(f"Training of {config['model']['name']}", _summary(epochs, points, alarms), sections)
    return write_report(report, folder, "summary.html", pictures=False)


def _summary(epochs: list[dict], points: list[dict], alarms: list[dict]) -> list[str]:
    update = max((int(row["update"]) for row in [*epochs, *points]), default=0)
    texts = [f"After {update} updates" + (f", at the end of epoch {epochs[-1]['epoch']}:" if epochs else ":")]
    if epochs:
        best = max(epochs, key=_accuracy)
        texts.append(
            f"validation accuracy {_accuracy(epochs[-1]):.1%}, the best {_accuracy(best):.1%} after epoch "
            f"{best['epoch']}" + (" (of the moving average of the weights)." if best["ema_val_accuracy"] else ".")
        )
    texts.append(f"{len(alarms)} alarms." if len(alarms) != 1 else "1 alarm.")
    return [" ".join(texts)]


def _accuracy(row: dict[str, str]) -> float:
    return float(row["ema_val_accuracy"] or row["val_accuracy"])


def _facts(config: dict[str, Any], environment: dict[str, Any], epochs: list[dict]) -> Section:
    versions = environment["versions"]
    gpus = environment["gpus"]
    data, optim, schedule = config["data"], config["optim"], config["schedule"]
    length = f"{schedule['epochs']} epochs" if schedule["updates"] is None else f"{schedule['updates']} updates"
    facts = {
        "Model": " ".join([config["model"]["name"], *(f"{k}={v}" for k, v in config["model"]["kwargs"].items())]),
        "Data": f"{data['name']}" + (f" in {data['root']}" if data["root"] else ""),
        "Images": ". ".join(environment.get("data", ())) or "unknown",
        "Training": f"{optim['name']}, peak learning rate {optim['lr']:g}, {schedule['name']} schedule over {length}, "
        f"{data['batch_size']} images per update, {config['run']['precision']}, seed {config['run']['seed']}",
        "Hardware": f"{gpus[0]}, {environment['processes']} processes" if gpus else f"CPU, {environment['platform']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Commit": environment["commit"] or "unknown",
        "Started": datetime.strptime(environment["started"], "%Y-%m-%dT%H:%M:%S%z").strftime("%Y-%m-%d %H:%M %z"),
    }
    links = {name: name for name in LINKED}
    return Section("The run", facts=facts, links=links)


def _alarms(alarms: list[dict]) -> Section:
    if not alarms:
        return Section("Alarms", ["None."])
    rows = [[row["update"], row["kind"], layer_label(row["layer"]), row["message"]] for row in alarms[:MOST_ALARMS]]
    left = len(alarms) - len(rows)
    texts = [f"The first {len(rows)}; alarms.csv has {left} more."] if left else []
    return Section("Alarms", texts, table=Table(("update", "what", "layer", "message"), rows, words=True))


def _curves(epochs: list[dict], points: list[dict]) -> Section:
    figures = []
    for name, title, key, columns in (
        ("loss", "Loss", "loss", {"val_loss": ("validation", ORANGE), "ema_val_loss": ("moving average", GREEN)}),
        (
            "accuracy",
            "Accuracy (%)",
            "accuracy",
            {"val_accuracy": ("validation", ORANGE), "ema_val_accuracy": ("moving average", GREEN)},
        ),
        ("lr", "Learning rate", "lr", {}),
        ("speed", "Images per second", "images_per_second", {}),
    ):
        scale = 100 if key == "accuracy" else 1
        canvas, axes = _panel(title)
        _line(axes, points, key, scale, "training, since the last point", BLUE)
        for column, (label, colour) in columns.items():
            _line(axes, epochs, column, scale, label, colour, marker="o")
        if columns and axes.lines:
            axes.legend(fontsize="small")
        if name == "speed":
            axes.set_ylim(bottom=0)
        figures.append(Figure(name, canvas, f"{title} over updates.", f"{title} over updates"))
    text = (
        "Training loss and accuracy are those on augmented and, where the run mixes, mixed images: they need not reach "
        "the validation's."
    )
    return Section("Curves", [text], figures=figures)


def _panel(title: str) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(6.4, 3.6), layout="constrained")
    axes = canvas.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)
    return canvas, axes


def _line(axes: Axes, rows: list[dict], key: str, scale: float, label: str, colour: Any, marker: str = "") -> None:
    numbers = [(int(row["update"]), scale * float(row[key])) for row in rows if row[key]]
    numbers = [(update, value) for update, value in numbers if np.isfinite(value)]
    if numbers:
        # A single point needs a mark to be seen.
        axes.plot(*zip(*numbers), color=colour, label=label, marker=marker or ("." if len(numbers) == 1 else ""))


def _routing(rows: list[dict]) -> Section:
    layers: dict[str, list[dict]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append(row)
    figures = []
    for name, title, key, scale in (
        ("dropped", "Choices dropped (%)", "dropped", 100),
        ("importance", "Coefficient of variation of the experts' importance", "importance_cv", 1),
    ):
        if not any(row[key] for row in rows):
            continue
        canvas, axes = _panel(title)
        # The deeper, the lighter.
        colours = colormaps["cividis"](np.linspace(0, 0.85, len(layers)))
        for (layer, points), colour in zip(layers.items(), colours):
            _line(axes, points, key, scale, layer_label(layer), colour)
        axes.legend(fontsize="small", ncols=2)
        figures.append(Figure(name, canvas, f"{title}, by MoE layer; deeper ones are lighter.", title))
    for number, (layer, points) in enumerate(layers.items()):
        label = layer_label(layer)
        caption = f"{label}: each expert's share of the processed choices, even is 1 (darker is less)."
        figures.append(Figure(f"load_{number}", _load(layer, points), caption, f"Load per expert over time, {label}"))
    text = "One forward of the first process at every log point. A dark row is an expert that processes nothing."
    return Section("Routing", [text], figures=figures)


def _load(layer: str, rows: list[dict]) -> Canvas:
    """Heat map: experts down, updates to the right, load over an even one."""
    names = [name for name in rows[0] if name.startswith("load_") and rows[0][name]]
    loads = np.array([[float(row[name]) for name in names] for row in rows]) * len(names)
    updates = [int(row["update"]) for row in rows]
    loads = _thinned(loads)
    canvas = Canvas(figsize=(6.4, 1.6 + 0.16 * max(len(names), 8)), layout="constrained")
    axes = canvas.add_subplot()
    # Twice an even load is as bright as it gets: what matters is which experts get less.
    image = axes.imshow(
        loads.T,
        cmap="cividis",
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
        extent=(updates[0], max(updates[-1], updates[0] + 1), len(names) - 0.5, -0.5),
    )
    axes.set_title(f"Load per expert, {layer_label(layer)}")
    axes.set_xlabel("update")
    axes.set_ylabel("expert")
    axes.yaxis.get_major_locator().set_params(integer=True)
    canvas.colorbar(image, ax=axes, extend="max").set_label("load, even is 1")
    return canvas


def _thinned(loads: np.ndarray) -> np.ndarray:
    """Means of as many neighbouring log points as it takes to have MOST_COLUMNS at most."""
    step = -(-len(loads) // MOST_COLUMNS)
    return np.stack([loads[first : first + step].mean(0) for first in range(0, len(loads), step)])


def _epochs(epochs: Sequence[dict]) -> Section:
    shown = {
        "epoch": ("epoch", "{:.0f}", 1),
        "train_loss": ("training loss", "{:.4f}", 1),
        "val_loss": ("validation loss", "{:.4f}", 1),
        "val_accuracy": ("accuracy, %", "{:.2f}", 100),
        "ema_val_accuracy": ("moving average's, %", "{:.2f}", 100),
        "dropped": ("dropped, %", "{:.1f}", 100),
    }
    shown = {key: how for key, how in shown.items() if any(row[key] for row in epochs)}
    rows = [
        [form.format(scale * float(row[key])) if row[key] else "" for key, (_, form, scale) in shown.items()]
        for row in epochs
    ]
    best = max(range(len(epochs)), key=lambda number: _accuracy(epochs[number]))
    column = list(shown).index("ema_val_accuracy" if epochs[best]["ema_val_accuracy"] else "val_accuracy")
    table = Table([title for title, _, _ in shown.values()], rows, best=frozenset({(best, column)}))
    return Section("Epochs", table=table)
