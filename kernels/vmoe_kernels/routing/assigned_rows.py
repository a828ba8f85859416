"""Slots together with their inverse: every choice's row of the buffer, and every row's choice.

The kernels that run the experts go by rows. The one that assigns slots owns the rows as well, so it says what each of
them holds in the same pass; who has slots alone inverts them, at a launch or two in the forward and in the backward.

Dims: T tokens in groups of S (the last one may be smaller), K choices per token, E experts, R rows per expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_kernels import vmap
from vmoe_kernels.common.groups import choices_of_rows, rows_per_expert
from vmoe_kernels.common.impl import HAS_TRITON, register_triton, use_reference
from vmoe_kernels.routing.slots import assign_slots_reference, checked_options


class AssignedRows(NamedTuple):
    """Which choices have a row, and which rows a choice."""

    slots: Tensor
    """(T, K) int32 row of each choice, as `assign_slots` gives it, or -1 where dropped."""
    choices: Tensor
    """(E * R,) int32 choice t * K + k that each row holds, or -1 where it is empty."""


def _with_choices(
    experts: Tensor,
    gates: Tensor,
    num_experts: int,
    group_size: int,
    capacity: int,
    last_capacity: int,
    batch_priority: bool,
    priority: str,
) -> tuple[Tensor, Tensor]:
    """Eager twin of `assign_rows`: that of `assign_slots`, and a scatter."""
    options = (num_experts, group_size, capacity, last_capacity, batch_priority, priority)
    slots = assign_slots_reference(experts, gates, *options)
    rows = num_experts * rows_per_expert(experts.shape[0], group_size, capacity, last_capacity)
    return slots, choices_of_rows(slots.unsqueeze(0), rows).squeeze(0)


# The twin is the CPU's implementation.
_assign_rows_op = torch.library.custom_op(
    "vmoe::assign_rows",
    _with_choices,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor experts, Tensor gates, SymInt num_experts, SymInt group_size, SymInt capacity, "
    "SymInt last_capacity, bool batch_priority, str priority) -> (Tensor, Tensor)",
)


@_assign_rows_op.register_fake
def _(experts, gates, num_experts, group_size, capacity, last_capacity, batch_priority, priority):
    rows = num_experts * rows_per_expert(experts.shape[0], group_size, capacity, last_capacity)
    return experts.new_empty(experts.shape), experts.new_empty(rows)


_assign_rows_op.register_vmap(vmap.assign_rows)


def assign_rows(
    experts: Tensor,
    gates: Tensor,
    *,
    num_experts: int,
    group_size: int | None = None,
    capacity: int,
    last_capacity: int | None = None,
    batch_priority: bool = False,
    priority: str = "max",
    impl: str = "auto",
) -> AssignedRows:
    """`assign_slots`, whose arguments these are, and what its slots leave in each row of the buffer.

    Args:
        experts: (T, K) int32 expert of each choice, best first.
        gates: (T, K) gate of each choice; only BPR reads them.
        num_experts: E.
        group_size: S, tokens per group; None is one group of all tokens.
        capacity: C, slots per expert in a whole group.
        last_capacity: slots per expert in a smaller last group; None is `capacity`.
        batch_priority: BPR (largest priority first) instead of position order.
        priority: "max" (the first gate) or "sum" (of the K gates).
        impl: "auto", "triton" or "reference".

    Returns:
        AssignedRows; `moe_mlp` takes both.

    Raises:
        ValueError: if a shape, a dtype, a capacity or the priority is off.
    """
    options = checked_options(
        experts, gates, num_experts, group_size, capacity, last_capacity, batch_priority, priority
    )
    if use_reference(impl, gates, routing=(num_experts, experts.shape[1])):
        return AssignedRows(*_with_choices(experts, gates, *options))
    return AssignedRows(*torch.ops.vmoe.assign_rows(experts, gates.detach(), *options))


if HAS_TRITON:
    from vmoe_kernels.routing.triton_slots import assign_rows_triton

    register_triton(_assign_rows_op, assign_rows_triton)
