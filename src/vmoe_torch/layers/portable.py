"""The layer's steps for those who record PyTorch's operators: `torch.jit.trace`, ONNX, and tools built on them.

The eager twins define the steps, but not every recorder has their operators: stable sorts, accumulating writes. These
forms have one graph whatever the data, with and without gradients, in operators that ONNX has had since opset 13, and
without loops or shapes that depend on values. `steps` has them stand in for the functions of `vmoe_kernels` of the same
names, in eval mode, without noise and dropout.

A `Groups` says what the record knows of the number of tokens: `last_capacity` is an int where it is fixed, None where
all groups are whole, and a tensor (`last_capacities`) where nothing is known.

Dims: T tokens, K choices, D width, E experts, G groups of S tokens, C slots, R rows per expert, N = E * R.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vmoe_kernels import RouterOutput
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.recording import descending
from vmoe_torch.layers.scores import logits


def last_capacities(per_image: int, images: int, capacity: Callable[[int], int]) -> Tensor:
    """(S + 1,) int64: slots per expert of a group of up to so many images, by its number of tokens."""
    found = [0] * (images * per_image + 1)
    for size in range(per_image, len(found), per_image):
        found[size] = capacity(size)
    return torch.tensor(found)


def open_groups(tokens: int | Tensor, size: int, capacity: int, last_capacity: Tensor | None) -> Groups:
    """`Groups` of a number of tokens that the record leaves open: as many rows for the last as for any other."""
    return Groups(tokens, size, capacity, last_capacity, (tokens + size - 1) // size * capacity)


def router(x: Tensor, weight: Tensor, num_selected_experts: int) -> RouterOutput:
    """Gates, experts and logits; what losses and statistics read is None."""
    scores = logits(x, weight)
    left = probs = scores.softmax(-1)
    chosen = []
    for _ in range(num_selected_experts):
        chosen.append(left.argmax(1, keepdim=True))
        left = left.scatter(1, chosen[-1], -1.0)
    experts = torch.cat(chosen, 1)
    return RouterOutput(probs.gather(1, experts), experts.to(torch.int32), scores, None, None, None, None)


def assign_slots(
    experts: Tensor, gates: Tensor, num_experts: int, groups: Groups, batch_priority: bool, priority: str
) -> Tensor:
    """Slots as ever: a smaller last group is filled up with tokens that no expert gets."""
    # A fixed number of tokens shows in the shapes below: the record refuses any other.
    num_tokens, group_size, capacity, last_capacity, rows = groups
    gates = gates.detach()
    choices = experts.shape[1]
    count = (num_tokens + group_size - 1) // group_size
    group = torch.arange(count, device=experts.device).view(-1, 1, 1)
    index, limit = experts.long(), capacity
    if last_capacity is not None:
        missing = count * group_size - num_tokens
        index = torch.cat([index, index.new_full((missing, choices), num_experts)])
    if isinstance(last_capacity, int):
        limit = torch.where((group + 1) * group_size > num_tokens, last_capacity, capacity)
    elif last_capacity is not None:
        limit = last_capacity.to(experts.device)[(num_tokens - group * group_size).clamp(max=group_size)]
    index = index.view(count, group_size, choices)
    order = None
    if batch_priority:
        key = gates[:, 0] if priority == "max" else gates.sum(-1)
        key = torch.where(key.isnan(), -torch.inf, key)
        if last_capacity is not None:
            key = torch.cat([key, key.new_full((missing,), -torch.inf)])
        order = descending(key.view(count, group_size), 1, group_size).unsqueeze(-1).expand(-1, -1, choices)
        index = index.gather(1, order)
    # (G, K * S): rank-major. A choice's place is the number of earlier ones that want its expert.
    queue = index.transpose(1, 2).reshape(count, choices * group_size, 1)
    wants = (queue == torch.arange(num_experts, device=experts.device)).long()
    place = ((wants.cumsum(1) * wants).sum(-1) - 1).view(count, choices, group_size).transpose(1, 2)
    slots = torch.where(place < limit, index * rows + group * capacity + place, -1)
    if order is not None:
        slots = torch.zeros_like(slots).scatter(1, order, slots)
    return slots.reshape(-1, choices)[:num_tokens].to(torch.int32)


def dispatch(x: Tensor, slots: Tensor, num_rows: int) -> Tensor:
    """Every row fetches its token, or a row of zeros."""
    num_tokens, choices = slots.shape
    slots = slots.long().reshape(-1)
    choice = torch.arange(num_tokens * choices, device=x.device)
    # Dropped choices write behind the end, each to a place of its own.
    place = torch.where(slots < 0, num_rows + choice, slots)
    nothing = torch.zeros(num_rows + num_tokens * choices, dtype=torch.int64, device=x.device) + num_tokens
    token = nothing.scatter(0, place, choice // choices)[:num_rows]
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[token]


def combine(buffer: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """The eager twin's sum."""
    dtype = torch.promote_types(buffer.dtype, torch.float32)
    rows = buffer[slots.clamp(min=0).long()].to(dtype)
    rows = torch.where(slots.unsqueeze(-1) < 0, 0.0, rows)
    return (rows * gates.to(dtype).unsqueeze(-1)).sum(1).to(buffer.dtype)
