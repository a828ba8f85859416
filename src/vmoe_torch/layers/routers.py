"""Routers: the weight that scores experts, and expert choice (arXiv 2202.09368), where experts pick tokens."""

import math

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """The (E, D) weight that scores every token against every expert; no bias."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """LeCun normal, as the original: truncated at two standard deviations, variance 1 / D."""
        lecun_normal_(self.weight, fan_in=self.weight.shape[1])

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, num_experts={self.weight.shape[0]}"


@torch.no_grad()
def lecun_normal_(tensor: Tensor, fan_in: int) -> None:
    """Truncated normal with variance 1 / fan_in after truncation, as Flax has it."""
    # A normal cut at two standard deviations has this standard deviation.
    nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0)
    tensor.mul_(math.sqrt(1.0 / fan_in) / 0.87962566103423978)


def expert_choice(gates: Tensor, group_size: int, capacity: int, last_capacity: int) -> Tensor:
    """Every expert takes its best tokens: balanced by construction, and a token may have from 0 to E experts.

    Args:
        gates: (T, E), softmax over experts; ties go to the earlier token.
        group_size: S, tokens per group.
        capacity: tokens that an expert takes from a whole group.
        last_capacity: the same for a smaller last group.

    Returns:
        (T, E) int32 slots, one choice per expert, -1 where the expert did not take the token.

    Raises:
        ValueError: if a capacity is above the tokens of its group.
    """
    num_tokens, num_experts = gates.shape
    gates = gates.detach()
    groups = num_tokens // group_size
    whole = groups * group_size
    rest = num_tokens - whole
    rows = groups * capacity + (last_capacity if rest > 0 else 0)
    slots = torch.full_like(gates, -1, dtype=torch.int32)
    begin = torch.arange(num_experts, device=gates.device) * rows
    for first, count, size, taken in ((0, groups, group_size, capacity), (whole, 1, rest, last_capacity)):
        if count * size == 0:
            continue
        if taken > size:
            raise ValueError(f"capacity must be at most the {size} tokens of a group, got {taken}")
        part = slice(first, first + count * size)
        best = gates[part].view(count, size, num_experts).sort(dim=1, descending=True, stable=True).indices[:, :taken]
        place = torch.arange(count * taken, device=gates.device).view(count, taken, 1) + first // group_size * capacity
        slots[part].view(count, size, num_experts).scatter_(1, best, (place + begin).to(torch.int32))
    return slots
