"""Routing: tokens and a router weight to gates, experts and slots, in one call.

Chains `router` and `assign_slots`; `compute_capacity` is the paper's capacity (section 2.3), rounded as the original.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_kernels.common.checks import check_integer, check_number, check_rows
from vmoe_kernels.routing.router_op import router, router_reference
from vmoe_kernels.routing.slots import assign_slots, assign_slots_reference, rows_per_expert

__all__ = ["Routing", "compute_capacity", "num_groups", "route", "route_reference", "rows_per_expert"]


class Routing(NamedTuple):
    """Where every token goes and with what weight; floats are float32 (float64 for float64 inputs)."""

    gates: Tensor
    """(T, K) combine weights, largest first, not renormalised."""
    experts: Tensor
    """(T, K) int32 expert of each choice."""
    slots: Tensor
    """(T, K) int32 row of each choice in the (E * R, D) buffer, or -1 where dropped."""
    logits: Tensor
    """(T, E) without noise."""
    importance: Tensor
    """(G, E) sum of the noise-free gates."""
    load: Tensor
    """(G, E) mean probability of being selected if the noise were redrawn; 0 without noise."""
    mean_gates: Tensor
    """(G, E) mean of the gates that routing used."""
    top1_share: Tensor
    """(G, E) share of first choices; no gradient."""


def compute_capacity(
    num_tokens: int,
    num_experts: int,
    capacity_factor: float,
    num_selected_experts: int = 1,
    rounding: str = "ceil",
    multiple_of: int | None = 4,
) -> int:
    """Slots per expert and group: num_tokens * K * capacity_factor / E, rounded.

    Args:
        num_tokens: S, tokens of the group.
        num_experts: E.
        capacity_factor: 1.0 is just enough for perfectly balanced experts.
        num_selected_experts: K.
        rounding: "ceil" or "round" (half to even).
        multiple_of: the rounded value goes up to a multiple of this; None or 0 leaves it.

    Returns:
        C, at least 1.

    Raises:
        ValueError: if a number is of the wrong kind or not finite, the rounding is unknown, or the capacity falls below
            one slot or does not fit in int32.
    """
    # TorchScript compiles this function, so it spells out rounding half to even, and knows its types.
    if not torch.jit.is_scripting():
        num_tokens = check_integer("num_tokens", num_tokens, 0)
        num_experts = check_integer("num_experts", num_experts, 1)
        capacity_factor = check_number("capacity_factor", capacity_factor, "above 0", 0.0)
        num_selected_experts = check_integer("num_selected_experts", num_selected_experts, 1)
        multiple_of = check_integer("multiple_of", 0 if multiple_of is None else multiple_of, 0)
    exact = num_tokens * num_selected_experts * capacity_factor / num_experts
    if not torch.jit.is_scripting():
        check_rows(exact)
    if rounding == "ceil":
        capacity = math.ceil(exact)
    elif rounding == "round":
        capacity = math.floor(exact)
        rest = exact - capacity
        if rest > 0.5 or (rest == 0.5 and capacity % 2 == 1):
            capacity += 1
    else:
        raise ValueError(f"rounding must be 'ceil' or 'round', got {rounding}")
    if capacity < 1:
        raise ValueError(
            f"capacity must be at least 1 slot, got {capacity} from num_tokens={num_tokens}, "
            f"num_selected_experts={num_selected_experts}, capacity_factor={capacity_factor}, num_experts={num_experts}"
        )
    if multiple_of is not None and multiple_of > 0:
        capacity += -capacity % multiple_of
    return capacity


def num_groups(num_tokens: int, group_size: int) -> int:
    """G: whole groups, and a smaller one for what remains."""
    num_tokens = check_integer("num_tokens", num_tokens, 0)
    group_size = check_integer("group_size", group_size, 1, "at least 1 token")
    return -(-num_tokens // group_size)


def route_reference(
    x: Tensor,
    weight: Tensor,
    *,
    num_selected_experts: int,
    capacity: int,
    group_size: int,
    last_capacity: int,
    batch_priority: bool = False,
    priority: str = "max",
    noise_std: float = 0.0,
    seed: Tensor | None = None,
) -> Routing:
    """Eager twin of `route`."""
    scored = router_reference(
        x,
        weight,
        num_selected_experts=num_selected_experts,
        group_size=group_size,
        noise_std=noise_std,
        seed=seed,
    )
    slots = assign_slots_reference(
        scored.experts,
        scored.gates,
        num_experts=weight.shape[0],
        group_size=group_size,
        capacity=capacity,
        last_capacity=last_capacity,
        batch_priority=batch_priority,
        priority=priority,
    )
    return Routing(scored.gates, scored.experts, slots, *scored[2:])


def route(
    x: Tensor,
    weight: Tensor,
    *,
    num_selected_experts: int,
    capacity: int,
    group_size: int | None = None,
    last_capacity: int | None = None,
    batch_priority: bool = False,
    priority: str = "max",
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Routing:
    """Routes every token to K experts under a bounded capacity.

    Args:
        x: (T, D) tokens; groups are consecutive runs of `group_size`.
        weight: (E, D) router weight.
        num_selected_experts: K, in 1..E.
        capacity: C, slots per expert in a whole group.
        group_size: S, tokens per group; None is one group of all tokens.
        last_capacity: slots per expert in a smaller last group; None is `capacity`.
        batch_priority: BPR instead of position order.
        priority: "max" or "sum" of the token's gates, for BPR.
        noise_std: noise is N(0, (noise_std / E)^2) per logit.
        seed: 0-dim int64 Philox key; needed with noise.
        impl: "auto", "triton" or "reference".

    Returns:
        Routing.

    Raises:
        ValueError: if shapes, dtypes, devices, K, a capacity or the priority are off.
    """
    scored = router(
        x,
        weight,
        num_selected_experts=num_selected_experts,
        group_size=group_size,
        noise_std=noise_std,
        seed=seed,
        impl=impl,
    )
    slots = assign_slots(
        scored.experts,
        scored.gates,
        num_experts=weight.shape[0],
        group_size=group_size,
        capacity=capacity,
        last_capacity=last_capacity,
        batch_priority=batch_priority,
        priority=priority,
        impl=impl,
    )
    return Routing(scored.gates, scored.experts, slots, *scored[2:])
