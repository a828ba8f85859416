"""Slots: which choices get one of the C places of their expert, vanilla or by Batch Priority Routing (BPR).

Paper: arXiv 2106.05974, section 2.3 and 4.1, appendix C. Rank-major: every first choice comes before any second one.
Within a rank, tokens claim slots in order: by position (vanilla) or by priority, largest first, ties by position
(BPR). A choice that finds its expert full is dropped. Groups are independent.

Dims: T tokens in G groups of S (the last one may be smaller), K choices per token, E experts, C slots.
"""

import torch
from torch import Tensor

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_flag, check_integer, check_rows
from vmoe_kernels.common.groups import rows_per_expert, split_groups
from vmoe_kernels.common.impl import HAS_TRITON, register_triton, use_reference
from vmoe_kernels.common.transforms import differentiating

PRIORITIES = ("max", "sum")


def assign_slots_reference(
    experts: Tensor,
    gates: Tensor,
    num_experts: int,
    group_size: int,
    capacity: int,
    last_capacity: int,
    batch_priority: bool = False,
    priority: str = "max",
) -> Tensor:
    """Eager twin of `assign_slots`: two stable sorts, no one-hot, no host synchronisation."""
    num_tokens, _ = experts.shape
    rows = rows_per_expert(num_tokens, group_size, capacity, last_capacity)
    # Here as well, for a compiled graph calls the op itself.
    check_rows(num_experts * rows)
    parts, first_row = [], 0
    for (tokens, count), places in zip(split_groups(num_tokens, group_size), (capacity, last_capacity)):
        if tokens.start == tokens.stop:
            continue
        index = experts[tokens].view(count, -1, experts.shape[1]).long()
        key = None
        if batch_priority:
            key = gates[tokens, 0] if priority == "max" else gates[tokens].sum(-1)
            key = key.detach().view(count, -1)
        position = queue_places(index, key, num_experts)
        start = first_row + places * torch.arange(count, device=experts.device).view(-1, 1, 1)
        row = torch.where(position < places, index * rows + start + position, -1)
        parts.append(row.flatten(0, 1))
        first_row += count * places
    if not parts:
        return experts.new_empty(experts.shape)
    return torch.cat(parts).to(torch.int32)


def queue_places(experts: Tensor, key: Tensor | None, num_experts: int) -> Tensor:
    """(G, S, K) int64 experts -> (G, S, K) place of each choice in its expert's queue, by key (G, S) or position."""
    groups, tokens, choices = experts.shape
    device = experts.device
    order = None
    if key is not None:
        # NaN priorities come last.
        key = torch.where(key.isnan(), -torch.inf, key)
        order = key.argsort(dim=1, descending=True, stable=True)
        experts = experts.gather(1, order.unsqueeze(-1).expand(-1, -1, choices))
    # (G, K, S): rank-major queue order, then a stable sort by (group, expert) lines the queues up.
    queue = (torch.arange(groups, device=device).view(-1, 1, 1) * num_experts + experts.transpose(1, 2)).reshape(-1)
    if torch.compiler.is_exporting():
        # Keys that are all different: ONNX has no stable sort, and OpenVINO returns equal keys in any order.
        index = (queue * queue.numel() + torch.arange(queue.numel(), device=device)).argsort()
        sorted_queue = queue[index]
    else:
        sorted_queue, index = queue.sort(stable=True)
    if torch.compiler.is_exporting() or differentiating():
        # The same begin of each queue, in operators that ONNX has, and vmap within torch.func's gradients.
        length = queue.new_zeros(groups * num_experts).scatter_add(0, queue, torch.ones_like(queue))
        begin = length.cumsum(0) - length
    else:
        begin = torch.searchsorted(sorted_queue, torch.arange(groups * num_experts, device=device))
    # Three times as fast as indexing on a CPU.
    ranks = torch.arange(queue.numel(), device=device) - begin.gather(0, sorted_queue)
    place = torch.empty_like(queue).scatter(0, index, ranks).view(groups, choices, tokens).transpose(1, 2)
    if order is None:
        return place
    return place.scatter(1, order.unsqueeze(-1).expand(-1, -1, choices), place)


# The twin is the CPU's implementation.
_assign_slots_op = torch.library.custom_op(
    "vmoe::assign_slots",
    assign_slots_reference,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor experts, Tensor gates, SymInt num_experts, SymInt group_size, SymInt capacity, "
    "SymInt last_capacity, bool batch_priority, str priority) -> Tensor",
)


@_assign_slots_op.register_fake
def _(experts, gates, num_experts, group_size, capacity, last_capacity, batch_priority, priority):
    return experts.new_empty(experts.shape)


_assign_slots_op.register_vmap(vmap.assign_slots)


def checked_options(
    experts: Tensor,
    gates: Tensor,
    num_experts: int,
    group_size: int | None,
    capacity: int,
    last_capacity: int | None,
    batch_priority: bool,
    priority: str,
) -> tuple[int, int, int, int, bool, str]:
    """What is not a tensor among the arguments of `assign_slots`, as its op takes it, once all of them are in order."""
    if experts.ndim != 2 or experts.dtype != torch.int32:
        raise ValueError(f"experts must be (T, K) int32, got {tuple(experts.shape)} {experts.dtype}")
    if gates.shape != experts.shape:
        raise ValueError(f"gates must have the shape of experts {tuple(experts.shape)}, got {tuple(gates.shape)}")
    group_size = max(experts.shape[0], 1) if group_size is None else group_size
    last_capacity = capacity if last_capacity is None else last_capacity
    num_experts = check_integer("num_experts", num_experts, 1)
    group_size = check_integer("group_size", group_size, 1, "at least 1 token")
    capacity = check_integer("capacity", capacity, 1, "at least 1 slot")
    last_capacity = check_integer("last_capacity", last_capacity, 1, "at least 1 slot")
    batch_priority = check_flag("batch_priority", batch_priority)
    check_rows(num_experts * rows_per_expert(experts.shape[0], group_size, capacity, last_capacity))
    if priority not in PRIORITIES:
        raise ValueError(f"priority must be one of {PRIORITIES}, got {priority!r}")
    return num_experts, group_size, capacity, last_capacity, batch_priority, priority


def assign_slots(
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
) -> Tensor:
    """Gives every choice a row of the expert buffer, or -1 where its expert is full.

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
        (T, K) int32: row e * R + g * C + c for slot c of expert e in group g, with R = `rows_per_expert(...)`.

    Raises:
        ValueError: if a shape, a dtype, a capacity or the priority is off.
    """
    options = checked_options(
        experts, gates, num_experts, group_size, capacity, last_capacity, batch_priority, priority
    )
    # The gates name the dtype: float64 ones are the reference's.
    if use_reference(impl, gates, routing=(num_experts, experts.shape[1])):
        return assign_slots_reference(experts, gates, *options)
    return torch.ops.vmoe.assign_slots(experts, gates.detach(), *options)


if HAS_TRITON:
    from vmoe_kernels.routing.triton_slots import assign_slots_triton

    register_triton(_assign_slots_op, assign_slots_triton)
