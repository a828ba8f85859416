"""vmoe-torch: V-MoE, the sparse vision mixture of experts (arXiv 2106.05974), for PyTorch and timm."""

from typing import TYPE_CHECKING, Any

from vmoe_torch import cores, models  # noqa: F401  cores comes before torch is loaded
from vmoe_torch.control import auxiliary_loss, moe_layers, routing, routing_stats, set_routing
from vmoe_torch.hub import push_to_hf_hub, save_for_hf
from vmoe_torch.layers.int8_experts import quantize_experts
from vmoe_torch.layers.loss_scale import follow_loss_scale
from vmoe_torch.layers.unfollowed import AuxiliaryLossWarning
from vmoe_torch.models.vmoe import VMoE

__version__ = "0.1.0.dev0"

__all__ = [
    "AuxiliaryLossWarning",
    "VMoE",
    "auxiliary_loss",
    "follow_loss_scale",
    "inflate",
    "models",
    "moe_layers",
    "prune_experts",
    "push_to_hf_hub",
    "quantize_experts",
    "routing",
    "routing_stats",
    "save_for_hf",
    "set_budget",
    "set_routing",
    "to_dense",
    "upcycle",
]

if TYPE_CHECKING:
    from vmoe_torch.budget import set_budget
    from vmoe_torch.models.averaging import to_dense
    from vmoe_torch.models.inflation import inflate
    from vmoe_torch.models.pruning import prune_experts
    from vmoe_torch.models.upcycling import upcycle
else:

    def __getattr__(name: str) -> Any:
        # Loaded when it is asked for: whatever reads files stays out of `import vmoe_torch`.
        if name == "upcycle":
            from vmoe_torch.models.upcycling import upcycle

            return upcycle
        if name == "inflate":
            from vmoe_torch.models.inflation import inflate

            return inflate
        if name == "prune_experts":
            from vmoe_torch.models.pruning import prune_experts

            return prune_experts
        if name == "to_dense":
            from vmoe_torch.models.averaging import to_dense

            return to_dense
        if name == "set_budget":
            from vmoe_torch.budget import set_budget

            return set_budget
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
