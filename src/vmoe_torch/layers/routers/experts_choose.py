"""Expert choice (arXiv 2202.09368): experts pick tokens. Balanced by construction, so it has no auxiliary loss."""

from typing import Any

import torch
from torch import Tensor

from vmoe_kernels.common.checks import check_integer
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.options import CapacityFactor
from vmoe_torch.layers.recording import descending, static_sizes
from vmoe_torch.layers.routers.base import Routed, Router
from vmoe_torch.layers.scores import logits


class ExpertChoice(Router):
    """Every expert takes its best C tokens of a group, with the raw gates; K and BPR have no meaning."""

    ROUTING = ("capacity_factor", "eval_capacity_factor")
    NOTE = " (K and priority do not apply: experts choose their tokens)"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *args: Any,
        num_selected_experts: int,
        batch_priority: bool,
        priority: str,
        **options: Any,
    ):
        super().__init__(dim, num_experts, *args, **options)
        # For readers of any router.
        self.num_selected_experts = check_integer("num_selected_experts", num_selected_experts, 1)
        self.batch_priority, self.priority = batch_priority, priority
        if self.renormalize_gates:
            raise ValueError(
                "renormalize_gates must be False unless router is 'top_experts', got router='expert_choice'"
            )
        if self.size_loss_weight > 0:
            raise ValueError(
                f"size_loss_weight must be 0 for router='expert_choice', which has no loss, got {self.size_loss_weight}"
            )

    @torch.jit.unused
    def set_routing(self, *, capacity_factor: CapacityFactor, eval_capacity_factor: CapacityFactor | None) -> None:
        """Checks and sets everything in `ROUTING`; on an error nothing changes."""
        self.set_capacity(capacity_factor, eval_capacity_factor)

    def route(self, tokens: Tensor, weight: Tensor, groups: Groups, seed: Tensor | None) -> Routed:
        scores = logits(tokens, weight)
        noisy = scores
        if self.training and self.noise_std > 0:
            noisy = scores + torch.randn_like(scores) * (self.noise_std / self.num_experts)
        gates = noisy.softmax(-1)
        slots = expert_choice(gates, groups.size, groups.capacity, groups.last_capacity)
        return Routed(gates, slots, {"logits": scores})

    def __prepare_scriptable__(self):
        raise RuntimeError("a scripted MoeMlp must route by top_experts or threshold, got expert_choice")


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
