"""Adaptive inference: the routing of each MoE layer, chosen for a budget of FLOPs or time."""

from vmoe_torch.budget.result import Budget, Candidate
from vmoe_torch.budget.search import set_budget
from vmoe_torch.budget.settings import LayerSetting

__all__ = ["Budget", "Candidate", "LayerSetting", "set_budget"]
