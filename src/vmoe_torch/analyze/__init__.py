"""What the routers of a V-MoE do: statistics, ablations, figures and a report. The figures need matplotlib."""

from vmoe_torch.analyze.ablation import Ablation, ablate_routers, random_routers
from vmoe_torch.analyze.analysis import CAPACITY_FACTORS, Analysis, analyze, describe_model, describe_routing
from vmoe_torch.analyze.clips import kept_clips_animation
from vmoe_torch.analyze.curves import capacity_curve, router_ablation, selected_experts_curve
from vmoe_torch.analyze.heatmaps import expert_by_class, expert_by_position
from vmoe_torch.analyze.loads import expert_loads, gates_by_depth
from vmoe_torch.analyze.numbers import (
    PatchExperts,
    collect_patch_experts,
    experts_per_patch,
    experts_per_token,
    number_section,
)
from vmoe_torch.analyze.patches import KeptPatches, collect_kept_patches, kept_patches_animation, kept_patches_grid
from vmoe_torch.analyze.share_figures import experts_that_took, patch_shares
from vmoe_torch.analyze.share_report import ShareAnalysis
from vmoe_torch.analyze.shares import ExpertsPerToken, Mixtures, Spread, collect_shares, shares_of_patches
from vmoe_torch.analyze.statistics import LayerRouting, collect_routing, kept_choices_per_patch
from vmoe_torch.data.sampling import sample
from vmoe_torch.report import Figure, Report, Section, Table, write_report

__all__ = [
    "CAPACITY_FACTORS",
    "Ablation",
    "Analysis",
    "ExpertsPerToken",
    "Figure",
    "KeptPatches",
    "LayerRouting",
    "Mixtures",
    "PatchExperts",
    "Report",
    "Section",
    "ShareAnalysis",
    "Spread",
    "Table",
    "ablate_routers",
    "analyze",
    "capacity_curve",
    "collect_kept_patches",
    "collect_patch_experts",
    "collect_routing",
    "collect_shares",
    "describe_model",
    "describe_routing",
    "expert_by_class",
    "expert_by_position",
    "expert_loads",
    "experts_per_patch",
    "experts_per_token",
    "experts_that_took",
    "gates_by_depth",
    "kept_choices_per_patch",
    "kept_clips_animation",
    "kept_patches_animation",
    "kept_patches_grid",
    "number_section",
    "patch_shares",
    "random_routers",
    "router_ablation",
    "sample",
    "selected_experts_curve",
    "shares_of_patches",
    "write_report",
]
