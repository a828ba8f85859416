"""Routers: the weight that scores experts, and expert choice (arXiv 2202.09368), where experts pick tokens."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vmoe_torch.layers.quantised import plain
from vmoe_torch.layers.recording import descending, static_sizes


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

    @torch.jit.ignore
    def forward(self, x: Tensor, use: Callable | None = None):
        """The logits of every expert, or another use of the weight.

        Args:
            x: (..., D) tokens.
            use: called in place of the product with x and the weight, while that is in place; `MoeMlp` passes the op
                that routes, as in `ExpertLinear`.

        Returns:
            (..., E) without noise, in float32 (float64 for float64 inputs), or what `use` returns: inside a `MoeMlp`,
            a `vmoe_kernels.Routing`, and for expert choice the (T, E) gates.

        Raises:
            ValueError: if the width of x is not D.
        """
        weight = plain(self.weight)
        if use is not None:
            return use(x, weight)
        if x.shape[-1:] != weight.shape[1:]:
            raise ValueError(f"x must be (..., {weight.shape[1]}), got {tuple(x.shape)}")
        return logits(x, weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """LeCun normal, as the original: truncated at two standard deviations, variance 1 / D."""
        lecun_normal_(self.weight, fan_in=self.weight.shape[1])

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, num_experts={self.weight.shape[0]}"


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
    num_tokens, num_experts = static_sizes(gates)
    gates = gates.detach()
    groups = num_tokens // group_size
    whole = groups * group_size
    rest = num_tokens - whole
    rows = groups * capacity + (last_capacity if rest > 0 else 0)
    begin = torch.arange(num_experts, device=gates.device) * rows
    parts = []
    for first, count, size, taken in ((0, groups, group_size, capacity), (whole, 1, rest, last_capacity)):
        if count * size == 0:
            continue
        if taken > size:
            raise ValueError(f"capacity must be at most the {size} tokens of a group, got {taken}")
        part = gates[first : first + count * size].view(count, size, num_experts)
        best = descending(part, 1, size)[:, :taken]
        place = torch.arange(count * taken, device=gates.device).view(count, taken, 1) + first // group_size * capacity
        empty = torch.full_like(part, -1, dtype=torch.int32)
        parts.append(empty.scatter(1, best, (place + begin).to(torch.int32)).view(-1, num_experts))
    return torch.cat(parts) if parts else torch.full_like(gates, -1, dtype=torch.int32)
