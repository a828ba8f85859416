"""Batching rules: what `torch.vmap` does with the ops, each as one call of the same op on a larger problem.

Samples are laid side by side: their tokens follow each other, and expert e's R rows become B * R, sample by sample.
Where weights differ between samples, the samples' experts lie side by side instead. What no single call can do is
refused: random numbers, which are counted by position, and groups that would straddle two samples.

Dims: B samples; of one sample, T tokens, K choices, E experts, R rows of an expert, N = E * R rows, D, H, O widths.
"""

import torch
from torch import Tensor

from vmoe_kernels.common.checks import MAX_ROWS
from vmoe_kernels.common.groups import choices_of_rows, expert_of_slot, rows_per_expert
from vmoe_kernels.common.impl import row_tile, wants_grad


def _samples(tensor: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """(B, ...): the batched dimension in front, or the same tensor B times."""
    if tensor is None:
        return None
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _joined(tensor: Tensor | None) -> Tensor | None:
    """(B, X, ...) to (B * X, ...)."""
    return None if tensor is None else tensor.flatten(0, 1)


def _side_by_side(tensor: Tensor) -> Tensor:
    """(B, E, R, W) to (E, B * R, W)."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _apart(tensor: Tensor, count: int) -> Tensor:
    """(E, B * R, W) to (B, E, R, W)."""
    return tensor.unflatten(1, (count, tensor.shape[1] // count)).transpose(0, 1)


def _shifted(slots: Tensor, rows: int, num_rows: int) -> Tensor:
    """(B, T, K) slots to (B * T, K): sample b's move by b * rows, of num_rows that a sample has in all."""
    count = slots.shape[0]
    if count * num_rows >= MAX_ROWS:
        raise ValueError(f"vmap needs fewer than 2**31 rows in all, got {count} samples of {num_rows}")
    first = torch.arange(count, device=slots.device, dtype=slots.dtype).view(-1, 1, 1) * rows
    return torch.where(slots < 0, slots, slots + first).flatten(0, 1)


def _whole_groups(op: str, num_tokens: int, group_size: int) -> int:
    """The group size that keeps the groups of joined samples apart."""
    if num_tokens <= group_size:
        return max(num_tokens, 1)
    if num_tokens % group_size:
        raise ValueError(
            f"vmap over {op} needs groups that divide the tokens of a sample, got {num_tokens} tokens in groups of "
            f"{group_size}"
        )
    return group_size


def _refuse_dropout(op: str, drop: float) -> None:
    if drop > 0:
        raise ValueError(f"vmap over {op} needs drop=0, got {drop}: its random numbers are counted by row")


def router(info, in_dims, x, weight, num_selected_experts, group_size, noise_std, seed, noise=None):
    count = info.batch_size
    if in_dims[1] is not None:
        raise ValueError("vmap over router needs one weight for all samples, got a batched weight")
    if noise_std > 0:
        raise ValueError(
            f"vmap over router needs noise_std=0, got {noise_std}: its random numbers are counted by token"
        )
    x = _samples(x, in_dims[0], count)
    group_size = _whole_groups("router", x.shape[1], group_size)
    outputs = torch.ops.vmoe.router(_joined(x), weight, num_selected_experts, group_size, 0.0, None)
    return tuple(each.unflatten(0, (count, each.shape[0] // count)) for each in outputs), (0,) * len(outputs)


def assign_slots(
    info, in_dims, experts, gates, num_experts, group_size, capacity, last_capacity, batch_priority, priority
):
    count = info.batch_size
    experts, gates = (_samples(each, dim, count) for each, dim in zip((experts, gates), in_dims))
    num_tokens = experts.shape[1]
    if 0 < num_tokens < group_size:
        capacity = last_capacity
    group_size = _whole_groups("assign_slots", num_tokens, group_size)
    slots = torch.ops.vmoe.assign_slots(
        _joined(experts), _joined(gates), num_experts, group_size, capacity, capacity, batch_priority, priority
    ).view(experts.shape)
    # From row e * B * R + b * R + r of all samples to row e * R + r of its own.
    rows = rows_per_expert(num_tokens, group_size, capacity, capacity)
    own = slots // max(count * rows, 1) * rows + slots % max(rows, 1)
    return torch.where(slots < 0, slots, own), 0


def assign_rows(info, in_dims, experts, gates, num_experts, group_size, capacity, last_capacity, *order):
    options = (num_experts, group_size, capacity, last_capacity, *order)
    slots, _ = assign_slots(info, in_dims, experts, gates, *options)
    rows = num_experts * rows_per_expert(slots.shape[1], group_size, capacity, last_capacity)
    return (slots, choices_of_rows(slots, rows)), (0, 0)


def assign_dropless_slots(info, in_dims, experts, num_experts, group_size, tile):
    count = info.batch_size
    experts = _samples(experts, in_dims[0], count)
    group_size = _whole_groups("assign_dropless_slots", experts.shape[1], group_size)
    # Every sample has experts of its own: its rows lie together, and count from the first of them.
    own = _own_experts(experts, num_experts)
    slots, spans = torch.ops.vmoe.assign_dropless_slots(_joined(own), count * num_experts, group_size, tile)
    spans = spans.unflatten(1, (count, num_experts)).transpose(0, 1)
    first = spans[:, 0, :1]
    slots = slots.view(experts.shape)
    return (torch.where(slots < 0, slots, slots - first.unsqueeze(-1)), spans - first.unsqueeze(-1)), (0, 0)


def _own_experts(experts: Tensor, num_experts: int) -> Tensor:
    """(B, T, K) experts of each sample's own, sample b's from b * E on; -1 stays."""
    first = torch.arange(len(experts), device=experts.device, dtype=experts.dtype).view(-1, 1, 1) * num_experts
    return torch.where(experts < 0, experts, experts + first)


def dispatch(info, in_dims, x, slots, num_rows):
    count = info.batch_size
    x, slots = (_samples(each, dim, count) for each, dim in zip((x, slots), in_dims))
    buffer = torch.ops.vmoe.dispatch(_joined(x), _shifted(slots, num_rows, num_rows), count * num_rows)
    return buffer.unflatten(0, (count, num_rows)), 0


def combine(info, in_dims, buffer, slots, gates):
    count = info.batch_size
    buffer, slots, gates = (_samples(each, dim, count) for each, dim in zip((buffer, slots, gates), in_dims))
    y = torch.ops.vmoe.combine(_joined(buffer), _shifted(slots, buffer.shape[1], buffer.shape[1]), _joined(gates))
    return y.unflatten(0, (count, slots.shape[1])), 0


def expert_mlp(info, in_dims, x, *arguments):
    *weights, activation, drop, _, save = arguments
    _refuse_dropout("expert_mlp", drop)
    # Inside vmap a batched tensor does not show that it requires a gradient.
    save = save or wants_grad(x, *weights)
    count, settings = info.batch_size, (activation, drop, None, save)
    x = _samples(x, in_dims[0], count)
    if all(dim is None for dim in in_dims[1:5]):
        out, pre = torch.ops.vmoe.expert_mlp(_side_by_side(x), *weights, *settings)
        return (_apart(out, count), _apart(pre, count)), (0, 0)
    weights = [_joined(_samples(each, dim, count)) for each, dim in zip(weights, in_dims[1:5])]
    out, pre = torch.ops.vmoe.expert_mlp(_joined(x), *weights, *settings)
    return (out.unflatten(0, x.shape[:2]), pre.unflatten(0, x.shape[:2])), (0, 0)


def moe_mlp(info, in_dims, x, slots, gates, w1, b1, w2, b2, rows, activation, drop, _seed, save, _choices=None):
    # Without the choices of the rows: those of joined samples lie elsewhere.
    weights = (w1, b1, w2, b2)
    _refuse_dropout("moe_mlp", drop)
    save = save or wants_grad(x, gates, *weights)
    count, settings = info.batch_size, (activation, drop, None, save)
    x, slots, gates = (_samples(each, dim, count) for each, dim in zip((x, slots, gates), in_dims))
    shared = all(dim is None for dim in in_dims[3:7])
    if shared:
        # From row e * R + r of its own to row e * B * R + b * R + r of all samples.
        num_rows, all_rows = weights[0].shape[0] * rows, count * rows
        spread = slots + slots // max(rows, 1) * (all_rows - rows)
        joined = _shifted(torch.where(slots < 0, slots, spread), rows, num_rows)
    else:
        weights = [_joined(_samples(each, dim, count)) for each, dim in zip(weights, in_dims[3:7])]
        num_rows, all_rows = weights[0].shape[0] // count * rows, rows
        joined = _shifted(slots, num_rows, num_rows)
    y, pre = torch.ops.vmoe.moe_mlp(_joined(x), joined, _joined(gates), *weights, all_rows, *settings)
    pre = _apart(pre, count) if shared else pre.unflatten(0, (count, -1))
    return (y.unflatten(0, (count, x.shape[1])), pre), (0, 0)


def dropless_mlp(info, in_dims, x, slots, spans, gates, *arguments):
    *weights, activation, drop, _, save = arguments
    _refuse_dropout("dropless_mlp", drop)
    save = save or wants_grad(x, gates, *weights)
    count = info.batch_size
    inputs = zip((x, slots, spans, gates), in_dims)
    x, slots, spans, gates = (_samples(each, dim, count) for each, dim in inputs)
    num_experts = spans.shape[2]
    # Parts of the samples lie elsewhere when these are joined: the rows are assigned anew.
    experts = expert_of_slot(slots, spans[:, :1].unsqueeze(1))
    if any(dim is not None for dim in in_dims[4:8]):
        weights = [_joined(_samples(each, dim, count)) for each, dim in zip(weights, in_dims[4:8])]
        experts, num_experts = _own_experts(experts, num_experts), count * num_experts
    experts = _joined(experts)
    slots, spans = torch.ops.vmoe.assign_dropless_slots(
        experts, num_experts, max(len(experts), 1), row_tile(experts.device)
    )
    y, pre = torch.ops.vmoe.dropless_mlp(
        _joined(x), slots, spans, _joined(gates), *weights, activation, drop, None, save
    )
    return (y.unflatten(0, (count, x.shape[1])), pre), (0, None)
