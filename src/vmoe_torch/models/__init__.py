"""V-MoE models, registered with timm on import."""

from vmoe_torch.models.vmoe import MoeBlock, VMoE, parse_moe_layers

__all__ = ["MoeBlock", "VMoE", "parse_moe_layers"]
