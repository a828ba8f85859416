"""What a model's experts were used for on some images: what pruning and averaging weigh them by."""

from typing import NamedTuple

from torch import Tensor


class ExpertUsage(NamedTuple):
    """Of one MoE layer; `vmoe_torch.evaluate.expert_usage` counts it."""

    choices: Tensor
    """(E,) int64 choices that each expert processed."""
    gates: Tensor
    """(E,) float64 sum of the gates of these choices."""
    tokens: int
    """Tokens that were routed, processed or not."""
