"""What the comparison of routers found: its tables, in the results and on the page "Which router should I use"."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.studies.typefaces.report import PRIORITY, spread
from benchmarks.studies.typefaces.routers import DIALLED
from benchmarks.studies.typefaces.runs import CLASSES, comparison, sizes

NOT_YET = "Which of them is best on the same data and FLOPs is not measured yet; no number is claimed here."


def sections(content: Mapping[str, Any]) -> list[str]:
    """Both tables, of results as JSON holds them; nothing before a model of the comparison is trained."""
    found = compared(content["runs"])
    if not found:
        return []
    return [
        "Routers and layouts of experts at the middle size, for equal training FLOPs, on typefaces of families never",
        "trained on (mean ± standard deviation over seeds):",
        "",
        *table(found, content.get("speed", {}).get("routers", {})),
        "",
        verdict(found),
        "",
        *dial_table(dialled(content["runs"])),
    ]


def compared(found: Sequence[dict]) -> dict[str, list[dict]]:
    """{label: its finished runs by seed}; empty if none was trained for the comparison alone."""
    by_name = {run["name"]: run for run in found}
    groups: dict[str, list[dict]] = {}
    for label, run in comparison():
        if run.name in by_name:
            groups.setdefault(label, []).append(by_name[run.name])
    alone = {run.name for _, run in comparison()} - {run.name for run in sizes()}
    return groups if alone & by_name.keys() else {}


def dialled(found: Sequence[dict]) -> dict[str, list[dict]]:
    """{label of a trained model: what its dials gave, by seed}."""
    groups = {}
    for label in DIALLED:
        names = {run.name for own, run in comparison() if own == label}
        runs = [run for run in found if run["kind"] == "dials" and run["after"] in names]
        if runs:
            groups[label] = sorted(runs, key=lambda run: run["seed"])
    return groups


def evaluation(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A sparse run's row at the routing of its training; None of a dense one."""
    if "evaluation" in run:
        return run["evaluation"]
    return next((row for row in run.get("settings", ()) if row["batch_priority"] == PRIORITY), None)


def filled(run: Mapping[str, Any]) -> float:
    """FLOPs of a forward if slots without a token cost nothing."""
    row = evaluation(run)
    return run["forward_flops"] if row is None else row["filled_flops"]


def table(found: Mapping[str, list[dict]], speed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each router or layout."""
    lines = [
        "| | top-1, % | seeds | training images, thousands | million parameters | MFLOPs | filled | µs for an image, "
        "training | inference | kB kept of an image |",
        "| --- |" + " ---: |" * 9,
    ]
    for label, runs in found.items():
        first = runs[0]
        lines.append(
            f"| {label} | {spread([run['test']['all'] for run in runs])} | {len(runs)} | {first['images'] / 1e3:.0f} "
            f"| {first['parameters'] / 1e6:.2f} | {first['forward_flops'] / 1e6:.1f} "
            f"| {statistics.mean(map(filled, runs)) / 1e6:.1f} | {_speed(speed.get(label))} |"
        )
    return lines


def _speed(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "- | - | -"
    cells = [f"{1e6 * measured[name][0]:.0f}" for name in ("step", "inference")]
    return " | ".join([*cells, f"{measured['kept'] / 1e3:.0f}"])


def verdict(found: Mapping[str, list[dict]]) -> str:
    """The order, and which differences are none."""
    top1 = {label: [100 * run["test"]["all"] for run in runs] for label, runs in found.items()}
    means = {label: statistics.mean(values) for label, values in top1.items()}
    best, *others = sorted(means, key=means.__getitem__, reverse=True)
    text = f"Best: {best}, {means[best]:.2f} %"
    text += "".join(f"; {label}, {means[label]:.2f} %" for label in others)
    widest = max((max(values) - min(values) for values in top1.values() if len(values) > 1), default=None)
    if widest is None:
        return f"{text}. Of one seed: no difference is certain."
    return f"{text}. Seeds of one model are up to {widest:.2f} points apart: smaller differences say nothing."


def processed(row: Mapping[str, Any]) -> float:
    """Experts that processed a token, on average."""
    return row["selected_experts"] * (1 - row["dropped"])


def points(runs: Sequence[dict], dial: str) -> list[tuple[float, float]]:
    """Experts per token and top-1 at the settings of a dial, means over seeds, from few experts to many."""
    columns = zip(*([row for row in run["dials"] if row["dial"] == dial] for run in runs), strict=True)
    return sorted(
        (statistics.mean(map(processed, rows)), statistics.mean(row["top1"] for row in rows)) for rows in columns
    )


def at(line: Sequence[tuple[float, float]], experts: float) -> float | None:
    """Top-1 at so many experts per token, between two settings in proportion; None out of range."""
    for (low, low_top1), (high, high_top1) in itertools.pairwise(line):
        if low <= experts <= high:
            return low_top1 + (high_top1 - low_top1) * (experts - low) / max(high - low, 1e-9)
    return None


def dials_of(runs: Sequence[dict]) -> list[str]:
    """The dials that were turned, in order."""
    return list(dict.fromkeys(row["dial"] for row in runs[0]["dials"]))


def dial_table(found: Mapping[str, list[dict]]) -> list[str]:
    """Every setting of every dial, and what each dial leaves at half the experts."""
    if not found:
        return []
    lines = ["Dials of trained V-MoEs, of the first seed, turned down without training; BPR:", ""]
    lines += [
        "| trained with | dial | set to | experts per token | MFLOPs | top-1, % |",
        "| --- | --- |" + " ---: |" * 4,
    ]
    for label, runs in found.items():
        for rows in zip(*(run["dials"] for run in runs), strict=True):
            flops = statistics.mean(row["flops"] for row in rows) / 1e6
            lines.append(
                f"| {label} | {rows[0]['dial']} | {_setting(rows[0])} | {statistics.mean(map(processed, rows)):.2f} "
                f"| {flops:.1f} | {spread([row['top1'] for row in rows])} |"
            )
    return [*lines, "", *halves(found), ""]


def _setting(row: Mapping[str, Any]) -> str:
    names = {"K": "num_selected_experts", "capacity": "capacity_factor", "threshold": "mean_selected_experts"}
    return f"{row[names[row['dial']]]:g}"


def halves(found: Mapping[str, list[dict]]) -> list[str]:
    """An item for each model: what is left by each dial at half the experts that process a token undialled."""
    lines = []
    for label, runs in found.items():
        lines_of = {dial: points(runs, dial) for dial in dials_of(runs)}
        half = max(experts for line in lines_of.values() for experts, _ in line) / 2
        left = {dial: top1 for dial, line in lines_of.items() if (top1 := at(line, half)) is not None}
        order = sorted(left, key=left.__getitem__, reverse=True)
        text = ", ".join(f"{100 * left[dial]:.2f} % by {dial}" for dial in order)
        lines.append(f"- {label}, at {half:.2f} experts per token: {text or 'no dial goes so far'}.")
    return lines


def docs_lines(content: Mapping[str, Any] | None) -> list[str]:
    """What the page says, of results as JSON holds them or before there are any."""
    found = compared(content["runs"]) if content else {}
    if not found:
        return [NOT_YET]
    lines = [
        f"Measured on {CLASSES:,} characters in typefaces never seen: small models on a CPU, equal training FLOPs.",
        "MFLOPs are of an image at full capacity; those filled are without empty slots, which cost time on a GPU and",
        "none on a CPU.",
        "",
        *table(found, content.get("speed", {}).get("routers", {})),
        "",
        "![Accuracy and cost of every router](figures/typefaces_routers.png)",
        "",
        verdict(found),
    ]
    turned = dialled(content["runs"])
    if turned:
        picture = "![Accuracy over experts per token, by dial](figures/typefaces_dials.png)"
        lines += ["", "And of trained V-MoEs, by the dial that is turned down:", "", picture, "", *halves(turned)]
    return lines
