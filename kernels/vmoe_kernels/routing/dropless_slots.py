"""Dropless slots: every choice gets a row, those of one expert after another, and no expert has more than it needs.

How many rows an expert has is known on the device alone, so the buffer is as large as the worst case: T * K rows and,
as an expert's part begins at a whole tile, up to tile - 1 for each expert.

Dims: T tokens in groups of S (the last one may be smaller), K choices per token, E experts, N rows of the buffer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_integer, check_rows
from vmoe_kernels.common.groups import dropless_rows, split_groups
from vmoe_kernels.common.impl import HAS_TRITON, ROW_TILE, register_triton, row_tile, use_reference
from vmoe_kernels.routing.slots import queue_places


class DroplessSlots(NamedTuple):
    """Where every choice's row is, and which rows are whose."""

    slots: Tensor
    """(T, K) int32 row of each choice in the (N, D) buffer, or -1 for a choice of no expert."""
    spans: Tensor
    """(2, E) int32: the first row of each expert, and the row past its last."""


def assign_dropless_slots_reference(
    experts: Tensor, num_experts: int, group_size: int, tile: int
) -> tuple[Tensor, Tensor]:
    """Eager twin of `assign_dropless_slots`: one stable sort, no host synchronisation."""
    check_rows(dropless_rows(experts.numel(), num_experts, tile))
    num_tokens, num_choices = experts.shape
    choices = torch.arange(experts.numel(), device=experts.device).view(experts.shape)
    # As slots with a capacity: group by group, in each every first choice before any second one.
    parts = [
        choices[tokens].view(groups, -1, num_choices).transpose(1, 2).reshape(-1)
        for tokens, groups in split_groups(num_tokens, group_size)
        if tokens.start != tokens.stop
    ]
    order = torch.cat(parts) if parts else choices.view(-1)
    # Choices of no expert wait for one that is not there.
    queue = experts.reshape(-1).long()[order]
    queue = torch.where(queue < 0, num_experts, queue)
    sizes = queue.new_zeros(num_experts + 1).scatter_add(0, queue, torch.ones_like(queue))[:-1]
    padded = (sizes + (tile - 1)) // tile * tile
    starts = padded.cumsum(0) - padded
    rows = queue_places(queue.view(1, -1, 1), None, num_experts + 1).view(-1)
    rows = torch.where(queue < num_experts, rows + starts[queue.clamp(max=num_experts - 1)], -1)
    slots = torch.empty_like(rows).scatter(0, order, rows).view(experts.shape)
    return slots.to(torch.int32), torch.stack([starts, starts + sizes]).to(torch.int32)


# The twin is the CPU's implementation.
_assign_dropless_slots_op = torch.library.custom_op(
    "vmoe::assign_dropless_slots",
    assign_dropless_slots_reference,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor experts, SymInt num_experts, SymInt group_size, SymInt tile) -> (Tensor, Tensor)",
)


@_assign_dropless_slots_op.register_fake
def _(experts, num_experts, group_size, tile):
    return experts.new_empty(experts.shape), experts.new_empty((2, num_experts))


_assign_dropless_slots_op.register_vmap(vmap.assign_dropless_slots)


def assign_dropless_slots(
    experts: Tensor, *, num_experts: int, group_size: int | None = None, tile: int | None = None, impl: str = "auto"
) -> DroplessSlots:
    """Gives every choice a row of its own among those of its expert.

    Args:
        experts: (T, K) int32 expert of each choice, different ones for a token; -1 for a choice that needs no row.
        num_experts: E.
        group_size: S, whose choices lie together, first ones first; None is one group of all tokens. It decides the
            order of an expert's rows, nothing else.
        tile: rows at whose multiples an expert's part begins; None is 128, which `dropless_mlp` needs on a GPU and
            takes on a CPU. A CPU takes any.
        impl: "auto", "triton" or "reference".

    Returns:
        DroplessSlots.

    Raises:
        ValueError: if a shape, a dtype or a number is off, or there may be 2**31 rows or more; on a GPU, if tile is no
            multiple of 128.
    """
    if experts.ndim != 2 or experts.dtype != torch.int32:
        raise ValueError(f"experts must be (T, K) int32, got {tuple(experts.shape)} {experts.dtype}")
    num_experts = check_integer("num_experts", num_experts, 1)
    group_size = max(experts.shape[0], 1) if group_size is None else group_size
    group_size = check_integer("group_size", group_size, 1, "at least 1 token")
    tile = check_integer("tile", ROW_TILE if tile is None else tile, 1, "at least 1 row")
    if tile % row_tile(experts.device):
        raise ValueError(f"tile must be a multiple of {ROW_TILE} on {experts.device}, got {tile}")
    check_rows(dropless_rows(experts.numel(), num_experts, tile))
    if use_reference(impl, experts, routing=(num_experts, experts.shape[1])):
        return DroplessSlots(*assign_dropless_slots_reference(experts, num_experts, group_size, tile))
    return DroplessSlots(*torch.ops.vmoe.assign_dropless_slots(experts, num_experts, group_size, tile))


if HAS_TRITON:
    from vmoe_kernels.routing.triton_dropless_slots import assign_dropless_slots_triton

    register_triton(_assign_dropless_slots_op, assign_dropless_slots_triton)
