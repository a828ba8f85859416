"""The layer's steps for those who record PyTorch's operators: `torch.jit.trace`, ONNX, and tools built on them.

The eager twins define the steps, but not every recorder has their operators: stable sorts, accumulating writes. These
forms have one graph whatever the data, with and without gradients, in operators that ONNX has had since opset 13, and
without loops or shapes that depend on values. They stand in for the functions of `vmoe_kernels` of the same names, with
their arguments, in eval mode: noise and dropout are none, and `impl` has no meaning.

`last_capacity` also says what the record knows of the number of tokens: an int, that it is fixed; None, that all groups
are whole; a tensor (`last_capacities`), nothing.

Dims: T tokens, K choices, D width, E experts, G groups of S tokens, C slots, R rows per expert, N = E * R.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import vmoe_kernels as kernels
from vmoe_kernels import Routing
from vmoe_torch.layers.recording import descending, static_sizes
from vmoe_torch.layers.routers import logits


def last_capacities(per_image: int, images: int, capacity: Callable[[int], int]) -> Tensor:
    """(S + 1,) int64: slots per expert of a group of up to so many images, by its number of tokens."""
    found = [0] * (images * per_image + 1)
    for size in range(per_image, len(found), per_image):
        found[size] = capacity(size)
    return torch.tensor(found)


def rows_per_expert(num_tokens: int, group_size: int, capacity: int, last_capacity: int | Tensor | None) -> int:
    """R: where the record knows nothing of the last group, as many rows for it as for any other."""
    if isinstance(last_capacity, int):
        return kernels.rows_per_expert(num_tokens, group_size, capacity, last_capacity)
    return (num_tokens + group_size - 1) // group_size * capacity


def route(
    x: Tensor,
    weight: Tensor,
    *,
    num_selected_experts: int,
    capacity: int,
    group_size: int,
    last_capacity: int | Tensor | None,
    batch_priority: bool,
    priority: str,
    **_,
) -> Routing:
    """Gates, experts, slots and logits; what losses and statistics read is None."""
    scores = logits(x, weight)
    left = probs = scores.softmax(-1)
    chosen = []
    for _ in range(num_selected_experts):
        chosen.append(left.argmax(1, keepdim=True))
        left = left.scatter(1, chosen[-1], -1.0)
    experts = torch.cat(chosen, 1)
    gates = probs.gather(1, experts)
    slots = assign_slots(
        experts,
        gates.detach(),
        num_experts=weight.shape[0],
        capacity=capacity,
        group_size=group_size,
        last_capacity=last_capacity,
        batch_priority=batch_priority,
        priority=priority,
    )
    return Routing(gates, experts.to(torch.int32), slots, scores, None, None, None, None)


def assign_slots(
    experts: Tensor,
    gates: Tensor,
    *,
    num_experts: int,
    capacity: int,
    group_size: int,
    last_capacity: int | Tensor | None,
    batch_priority: bool,
    priority: str,
    **_,
) -> Tensor:
    """Slots as ever: a smaller last group is filled up with tokens that no expert gets."""
    # A fixed number of tokens shows in the shapes below: the record refuses any other.
    num_tokens = static_sizes(experts)[0] if isinstance(last_capacity, int) else experts.shape[0]
    choices = experts.shape[1]
    rows = rows_per_expert(num_tokens, group_size, capacity, last_capacity)
    groups = (num_tokens + group_size - 1) // group_size
    group = torch.arange(groups, device=experts.device).view(-1, 1, 1)
    index, limit = experts.long(), capacity
    if last_capacity is not None:
        missing = groups * group_size - num_tokens
        index = torch.cat([index, index.new_full((missing, choices), num_experts)])
    if isinstance(last_capacity, int):
        limit = torch.where((group + 1) * group_size > num_tokens, last_capacity, capacity)
    elif last_capacity is not None:
        limit = last_capacity.to(experts.device)[(num_tokens - group * group_size).clamp(max=group_size)]
    index = index.view(groups, group_size, choices)
    order = None
    if batch_priority:
        key = gates[:, 0] if priority == "max" else gates.sum(-1)
        key = torch.where(key.isnan(), -torch.inf, key)
        if last_capacity is not None:
            key = torch.cat([key, key.new_full((missing,), -torch.inf)])
        order = descending(key.view(groups, group_size), 1, group_size).unsqueeze(-1).expand(-1, -1, choices)
        index = index.gather(1, order)
    # (G, K * S): rank-major. A choice's place is the number of earlier ones that want its expert.
    queue = index.transpose(1, 2).reshape(groups, choices * group_size, 1)
    wants = (queue == torch.arange(num_experts, device=experts.device)).long()
    place = ((wants.cumsum(1) * wants).sum(-1) - 1).view(groups, choices, group_size).transpose(1, 2)
    slots = torch.where(place < limit, index * rows + group * capacity + place, -1)
    if order is not None:
        slots = torch.zeros_like(slots).scatter(1, order, slots)
    return slots.reshape(-1, choices)[:num_tokens].to(torch.int32)


def dispatch(x: Tensor, slots: Tensor, num_rows: int, **_) -> Tensor:
    """Every row fetches its token, or a row of zeros."""
    num_tokens, choices = slots.shape
    slots = slots.long().reshape(-1)
    choice = torch.arange(num_tokens * choices, device=x.device)
    # Dropped choices write behind the end, each to a place of its own.
    place = torch.where(slots < 0, num_rows + choice, slots)
    nothing = torch.zeros(num_rows + num_tokens * choices, dtype=torch.int64, device=x.device) + num_tokens
    token = nothing.scatter(0, place, choice // choices)[:num_rows]
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[token]


def expert_mlp(x: Tensor, *weights: Tensor | None, activation: str, **_) -> Tensor:
    """The eager twin: it can be recorded as it is."""
    return kernels.expert_mlp_reference(x, *weights, activation=activation)


def combine(buffer: Tensor, slots: Tensor, gates: Tensor, **_) -> Tensor:
    """The eager twin's sum."""
    dtype = torch.promote_types(buffer.dtype, torch.float32)
    rows = buffer[slots.clamp(min=0).long()].to(dtype)
    rows = torch.where(slots.unsqueeze(-1) < 0, 0.0, rows)
    return (rows * gates.to(dtype).unsqueeze(-1)).sum(1).to(buffer.dtype)


def moe_mlp(
    x: Tensor, slots: Tensor, gates: Tensor, *weights: Tensor | None, rows_per_expert: int, activation: str, **_
) -> Tensor:
    """The three steps, chained."""
    num_experts = weights[0].shape[0]
    buffer = dispatch(x, slots, num_experts * rows_per_expert).view(num_experts, rows_per_expert, x.shape[1])
    return combine(expert_mlp(buffer, *weights, activation=activation).flatten(0, 1), slots, gates)
