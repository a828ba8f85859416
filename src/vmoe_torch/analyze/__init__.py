"""What the routers of a V-MoE do: statistics, figures and a report. The figures need matplotlib."""

from vmoe_torch.analyze.figures import capacity_curve, expert_by_class, gate_histograms, kept_patches_grid
from vmoe_torch.analyze.report import Figure, Report, Section, Table, write_report
from vmoe_torch.analyze.statistics import LayerRouting, collect_routing, kept_choices_per_patch

__all__ = [
    "Figure",
    "LayerRouting",
    "Report",
    "Section",
    "Table",
    "capacity_curve",
    "collect_routing",
    "expert_by_class",
    "gate_histograms",
    "kept_choices_per_patch",
    "kept_patches_grid",
    "write_report",
]
