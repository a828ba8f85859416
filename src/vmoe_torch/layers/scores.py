"""What a router's weight says of a token, and how that weight begins."""

import math

import torch
from torch import Tensor, nn


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """(..., D) tokens and an (E, D) weight to (..., E), never narrower than float32, also under autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type not in ("cpu", "cuda"):
        return x.to(dtype) @ weight.to(dtype).t()
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ weight.to(dtype).t()


@torch.no_grad()
def lecun_normal_(tensor: Tensor, fan_in: int) -> None:
    """Truncated normal with variance 1 / fan_in after truncation, as Flax has it."""
    # A normal cut at two standard deviations has this standard deviation.
    nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0)
    tensor.mul_(math.sqrt(1.0 / fan_in) / 0.87962566103423978)
