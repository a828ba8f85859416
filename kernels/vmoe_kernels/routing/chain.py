"""Routing: tokens and a router weight to gates, experts and slots, in one call: `router`, then `assign_slots`."""

from typing import NamedTuple

from torch import Tensor

from vmoe_kernels.routing.router_op import router
from vmoe_kernels.routing.slots import assign_slots


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


def route_reference(x: Tensor, weight: Tensor, **options: int | float | str | Tensor | None) -> Routing:
    """Eager twin of `route`, whose options it takes."""
    return route(x, weight, **options, impl="reference")
