"""The sparse MLP and its parts: routers, auxiliary losses, gradient injection."""

from vmoe_torch.layers.auxiliary import inject_auxiliary_loss
from vmoe_torch.layers.experts import ExpertLinear
from vmoe_torch.layers.experts_by_size import SizedLinear
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.loss_scale import auxiliary_gradient_scale, set_auxiliary_gradient_scale
from vmoe_torch.layers.losses import cv_squared, gshard_loss, importance_loss, load_loss, router_z_loss
from vmoe_torch.layers.moe_mlp import MoeMlp
from vmoe_torch.layers.routers import ROUTERS
from vmoe_torch.layers.routers.base import Routed, Router
from vmoe_torch.layers.routers.experts_choose import ExpertChoice, expert_choice
from vmoe_torch.layers.routers.soft import Soft
from vmoe_torch.layers.routers.threshold import Threshold
from vmoe_torch.layers.routers.top_experts import TopExperts
from vmoe_torch.layers.sizes import ExpertSizes

__all__ = [
    "ROUTERS",
    "ExpertChoice",
    "ExpertLinear",
    "ExpertSizes",
    "Groups",
    "MoeMlp",
    "Routed",
    "Router",
    "SizedLinear",
    "Soft",
    "Threshold",
    "TopExperts",
    "auxiliary_gradient_scale",
    "cv_squared",
    "expert_choice",
    "gshard_loss",
    "importance_loss",
    "inject_auxiliary_loss",
    "load_loss",
    "router_z_loss",
    "set_auxiliary_gradient_scale",
]
