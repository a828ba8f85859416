"""Figures of the comparison of routers: what each reached and costs, and which dial takes least away."""

import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.studies.typefaces.router_report import compared, dialled, dials_of, filled, points
from vmoe_torch.report.style import BLUE, GREEN, GREY, ORANGE

COLOURS = {"K": GREY, "capacity": BLUE, "threshold": ORANGE}


def drawn(content: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by file name, of results as JSON holds them; those that the finished runs allow."""
    found, turned = compared(content["runs"]), dialled(content["runs"])
    figures = {"routers": accuracy(found, content.get("speed", {}).get("routers", {}))} if found else {}
    return {**figures, "dials": dials(turned)} if turned else figures


def accuracy(found: Mapping[str, list[dict]], speed: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A line for each router or layout, best first: top-1 of every seed, FLOPs and, where measured, times."""
    top1 = {label: [100 * run["test"]["all"] for run in runs] for label, runs in found.items()}
    order = sorted(found, key=lambda label: statistics.mean(top1[label]))
    panels = 3 if all(label in speed for label in order) else 2
    figure = Figure(figsize=(4.4 + 2.3 * panels, 1.2 + 0.36 * len(order)), layout="constrained")
    left, costs, *times = figure.subplots(1, panels, sharey=True, width_ratios=(2, *[1] * (panels - 1)))
    for place, label in enumerate(order):
        left.plot(top1[label], [place] * len(top1[label]), "o", color=ORANGE, alpha=0.6, markeredgewidth=0)
        left.plot(statistics.mean(top1[label]), place, "|", color="black", markersize=14)
        costs.barh(place, found[label][0]["forward_flops"] / 1e6, color=BLUE, alpha=0.3)
        costs.barh(place, statistics.mean(map(filled, found[label])) / 1e6, color=BLUE, height=0.4)
        for axes in times:
            axes.barh(place, 1e6 * speed[label]["step"][0], color=GREEN, alpha=0.3)
            axes.barh(place, 1e6 * speed[label]["inference"][0], color=GREEN, height=0.4)
    left.set_yticks(range(len(order)), order)
    left.set_xlabel("top-1 on unseen typefaces, %\na dot for each seed, a line for their mean")
    costs.set_xlabel("MFLOPs per image\npale: empty slots, too")
    for axes in times:
        axes.set_xlabel("microseconds per image\npale: training, dark: inference")
    for axes in (left, costs, *times):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle("Equal training FLOPs", fontsize="medium")
    return figure


def dials(found: Mapping[str, list[dict]]) -> Figure:
    """A panel for each trained model: top-1 over experts per token, a line for each dial."""
    figure = Figure(figsize=(1.0 + 4.2 * len(found), 3.8), layout="constrained")
    for axes, (label, runs) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items()):
        for dial in dials_of(runs):
            experts, top1 = zip(*points(runs, dial))
            shown = [100 * value for value in top1]
            axes.plot(experts, shown, color=COLOURS[dial], marker="o", markersize=4, label=dial)
        axes.set_title(f"trained with {label}", fontsize="medium")
        axes.set_xlabel("experts that process a token, on average")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1 on unseen typefaces, %")
    figure.axes[0].legend(frameon=False, title="dial turned down")
    return figure
