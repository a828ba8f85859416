"""Evaluations as an aligned table, CSV or JSON."""

import math
from collections.abc import Sequence
from pathlib import Path

from vmoe_torch import files
from vmoe_torch.evaluate.classification import Evaluation


def as_rows(evaluations: Sequence[Evaluation]) -> list[dict]:
    """One flat dict of plain values per evaluation; shares are in 0..1, FLOPs per image."""
    return [
        {
            "num_selected_experts": e.setting.num_selected_experts,
            "capacity_factor": e.setting.capacity_factor,
            "actual_capacity_factor": None if math.isnan(e.capacity_factor) else e.capacity_factor,
            "batch_priority": e.setting.batch_priority,
            "mean_selected_experts": e.setting.mean_selected_experts,
            "gate_threshold": e.setting.gate_threshold,
            "selected_experts": None if math.isnan(e.selected) else e.selected,
            "images": e.images,
            "top1": e.top1,
            "top5": e.top5,
            "loss": e.loss,
            "dropped": e.dropped,
            "unprocessed": e.unprocessed,
            "flops": e.flops.total,
            "relative_flops": e.flops.relative,
            "filled_flops": None if math.isnan(e.filled_flops) else e.filled_flops,
        }
        for e in evaluations
    ]


def format_table(evaluations: Sequence[Evaluation]) -> str:
    """A plain-text table, one line per evaluation, columns aligned."""
    header = ("K", "capacity", "slots", "order", "top-1 %", "top-5 %", "loss", "dropped %", "MFLOPs", "vs dense")
    lines = [header]
    by_threshold = any({"mean_selected_experts", "gate_threshold"} & e.setting.changes().keys() for e in evaluations)
    if by_threshold:
        lines = [(*header[:4], "mean", "threshold", "selected", *header[4:])]
    # Of equal experts, what is filled says no more than the slots and what is dropped.
    by_size = any(e.flops.several_sizes for e in evaluations)
    if by_size:
        lines = [(*lines[0][:-1], "filled", lines[0][-1])]
    for e in evaluations:
        order = {None: "-", True: "BPR", False: "vanilla"}[e.setting.batch_priority]
        lines.append(
            (
                _text(e.setting.num_selected_experts),
                _text(e.setting.capacity_factor),
                "-" if math.isnan(e.capacity_factor) else f"{e.capacity_factor:.3f}",
                order,
                *(_threshold_cells(e) if by_threshold else ()),
                f"{100 * e.top1:.2f}",
                f"{100 * e.top5:.2f}",
                f"{e.loss:.3f}",
                f"{100 * e.dropped:.1f}",
                f"{e.flops.total / 1e6:.2f}",
                *([_filled(e)] if by_size else ()),
                f"{e.flops.relative:.3f}",
            )
        )
    return "\n".join(aligned(lines))


def aligned(rows: Sequence[tuple[str, ...]], left: int = 0) -> list[str]:
    """Lines of a plain-text table with a rule below its header.

    Args:
        rows: cells of each line, the header first.
        left: how many columns begin at the left; the others end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    places = ["<"] * left + [">"] * (len(widths) - left)
    lines = ["  ".join(f"{cell:{place}{width}}" for cell, place, width in zip(row, places, widths)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _threshold_cells(e: Evaluation) -> tuple[str, str, str]:
    """What was asked for, and what it came to."""
    asked = (_text(e.setting.mean_selected_experts), _text(e.setting.gate_threshold))
    return (*asked, "-" if math.isnan(e.selected) else f"{e.selected:.3f}")


def _filled(e: Evaluation) -> str:
    return "-" if math.isnan(e.filled_flops) else f"{e.filled_flops / 1e6:.2f}"


def _text(value) -> str:
    return "-" if value is None else str(value)


def write_csv(evaluations: Sequence[Evaluation], path: Path | str) -> None:
    """Writes `as_rows` with a header line; None is empty.

    Raises:
        OSError: if the file cannot be written; then what was there still is.
    """
    rows = as_rows(evaluations)
    files.write_text("table", path, files.csv_text(rows, list(rows[0])))


def write_json(evaluations: Sequence[Evaluation], path: Path | str) -> None:
    """Writes `as_rows` as a JSON list.

    Raises:
        OSError: if the file cannot be written; then what was there still is.
    """
    files.write_json("table", path, as_rows(evaluations))
