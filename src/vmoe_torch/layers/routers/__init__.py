"""Routers, by the word of `MoeMlp`'s `router` that chooses one; `options.RouterType` has the words for checkers."""

from vmoe_torch.layers.routers.base import Router
from vmoe_torch.layers.routers.experts_choose import ExpertChoice
from vmoe_torch.layers.routers.soft import Soft
from vmoe_torch.layers.routers.threshold import Threshold
from vmoe_torch.layers.routers.top_experts import TopExperts

ROUTERS: dict[str, type[Router]] = {
    "top_experts": TopExperts,
    "threshold": Threshold,
    "expert_choice": ExpertChoice,
    "soft": Soft,
}
