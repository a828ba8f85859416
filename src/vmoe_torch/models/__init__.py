"""V-MoE models, registered with timm on import."""

from vmoe_torch.models.ensemble import VMoEEnsemble
from vmoe_torch.models.vmoe import MoeBlock, VMoE, parse_moe_layers

__all__ = ["MoeBlock", "VMoE", "VMoEEnsemble", "parse_moe_layers"]
