"""What the routers of a V-MoE do: statistics, ablations, figures and a report. The figures need matplotlib."""

from vmoe_torch.analyze.ablation import Ablation, ablate_routers, random_routers
from vmoe_torch.analyze.analysis import CAPACITY_FACTORS, Analysis, analyze, describe_model, describe_routing, sample
from vmoe_torch.analyze.clips import kept_clips_animation
from vmoe_torch.analyze.curves import capacity_curve, router_ablation, selected_experts_curve
from vmoe_torch.analyze.heatmaps import expert_by_class, expert_by_position
from vmoe_torch.analyze.loads import expert_loads, gates_by_depth
from vmoe_torch.analyze.patches import KeptPatches, collect_kept_patches, kept_patches_animation, kept_patches_grid
from vmoe_torch.analyze.statistics import LayerRouting, collect_routing, kept_choices_per_patch
from vmoe_torch.report import Figure, Report, Section, Table, write_report

__all__ = [
    "CAPACITY_FACTORS",
    "Ablation",
    "Analysis",
    "Figure",
    "KeptPatches",
    "LayerRouting",
    "Report",
    "Section",
    "Table",
    "ablate_routers",
    "analyze",
    "capacity_curve",
    "collect_kept_patches",
    "collect_routing",
    "describe_model",
    "describe_routing",
    "expert_by_class",
    "expert_by_position",
    "expert_loads",
    "gates_by_depth",
    "kept_choices_per_patch",
    "kept_clips_animation",
    "kept_patches_animation",
    "kept_patches_grid",
    "random_routers",
    "router_ablation",
    "sample",
    "selected_experts_curve",
    "write_report",
]
