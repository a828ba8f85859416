"""V-MoE models, registered with timm on import."""

from vmoe_torch.models import soft_moe  # noqa: F401  registers its models
from vmoe_torch.models.blocks import MoeBlock, parse_moe_layers
from vmoe_torch.models.ensemble import VMoEEnsemble
from vmoe_torch.models.video import VideoVMoE
from vmoe_torch.models.vmoe import VMoE

__all__ = ["MoeBlock", "VMoE", "VMoEEnsemble", "VideoVMoE", "parse_moe_layers"]
