"""vmoe-torch: V-MoE, the sparse vision mixture of experts (arXiv 2106.05974), for PyTorch and timm."""

from vmoe_torch import cores, models  # noqa: F401  cores comes before torch is loaded
from vmoe_torch.control import auxiliary_loss, moe_layers, routing, routing_stats, set_routing
from vmoe_torch.models.vmoe import VMoE

__version__ = "0.1.0.dev0"

__all__ = [
    "VMoE",
    "auxiliary_loss",
    "models",
    "moe_layers",
    "routing",
    "routing_stats",
    "set_budget",
    "set_routing",
    "upcycle",
]


def __getattr__(name: str):
    # Loaded when it is asked for: whatever reads files stays out of `import vmoe_torch`.
    if name == "upcycle":
        from vmoe_torch.checkpoints import upcycle

        return upcycle
    if name == "set_budget":
        from vmoe_torch.budget import set_budget

        return set_budget
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
