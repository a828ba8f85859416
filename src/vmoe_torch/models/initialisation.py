"""How the weights of a `VMoE` begin, as the original's do."""

import math

from timm.layers import lecun_normal_
from torch import nn


def init_module(module: nn.Module, name: str = "", needs_reset: bool = True) -> None:
    """Flax's defaults and the original's choices, per module."""
    if isinstance(module, nn.Linear):
        if name == "head":
            nn.init.zeros_(module.weight)
        elif name.startswith("pre_logits"):
            lecun_normal_(module.weight)
        else:
            # Fused projections are separate matrices in the original.
            parts = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
            fan_out, fan_in = module.weight.shape[0] // parts, module.weight.shape[1]
            bound = math.sqrt(6.0 / (fan_out + fan_in))
            nn.init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if ".mlp." in f".{name}" else nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif name == "attn_pool":
        bound = math.sqrt(6.0 / (1 + module.latent.shape[-1]))
        nn.init.uniform_(module.latent, -bound, bound)
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()
