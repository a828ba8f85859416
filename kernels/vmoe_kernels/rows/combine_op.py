"""Combine: each token's expert outputs, weighted by its gates, summed.

Dims: T tokens, K choices per token, N rows of the buffer (E * R), D width.
"""

import torch
from torch import Tensor

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_rows
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    accumulation_dtype,
    check_floating,
    check_slots,
    no_autocast,
    register_triton,
    use_reference,
)
from vmoe_kernels.common.transforms import differs_backward, twin_gradients
from vmoe_kernels.rows.dispatch_op import choice_of_row


@no_autocast
def combine_reference(buffer: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """Eager twin of `combine`. A NaN gate shows in the output even where the choice was dropped."""
    dtype = accumulation_dtype(buffer.dtype)
    if buffer.shape[0] == 0:
        # Nothing to gather from; the row keeps the buffer in the graph.
        buffer = torch.cat([buffer, buffer.new_zeros(1, buffer.shape[1])])
    rows = buffer[slots.clamp(min=0).long()]
    rows = torch.where(slots.unsqueeze(-1) < 0, 0.0, rows.to(dtype))
    return (rows * gates.to(dtype).unsqueeze(-1)).sum(1).to(buffer.dtype)


@torch.library.custom_op("vmoe::combine", mutates_args=(), device_types="cpu")
def _combine_op(buffer: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    dtype = accumulation_dtype(buffer.dtype)
    y = nan_gates(gates.to(dtype), slots).expand(-1, buffer.shape[1]).contiguous()
    for rank in range(slots.shape[1]):
        kept = (slots[:, rank] >= 0).nonzero().squeeze(1)
        rows = buffer.index_select(0, slots[kept, rank].long()).to(dtype)
        y.index_add_(0, kept, rows * gates[kept, rank].to(dtype).unsqueeze(1))
    return y.to(buffer.dtype)


def nan_gates(gates: Tensor, slots: Tensor) -> Tensor:
    """(T, 1): 0, or NaN (also for an infinite gate) where a dropped choice would hide one."""
    return torch.where(slots < 0, gates * 0.0, 0.0).sum(1, keepdim=True)


@_combine_op.register_fake
def _(buffer, slots, gates):
    return buffer.new_empty((slots.shape[0], buffer.shape[1]))


@torch.library.custom_op("vmoe::combine_backward", mutates_args=(), device_types="cpu")
def _combine_backward_op(d_y: Tensor, buffer: Tensor, slots: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(buffer.dtype)
    num_choices = slots.shape[1]
    choices = choice_of_row(slots, buffer.shape[0])
    filled = (choices >= 0).nonzero().squeeze(1)
    choices = choices[filled]
    d_rows = d_y.index_select(0, choices // num_choices).to(dtype)
    d_gates = gates.new_zeros(gates.shape)
    d_gates.view(-1)[choices] = (d_rows * buffer.index_select(0, filled).to(dtype)).sum(1).to(gates.dtype)
    d_rows *= gates.reshape(-1)[choices].to(dtype).unsqueeze(1)
    d_buffer = buffer.new_zeros(buffer.shape).index_copy_(0, filled, d_rows.to(buffer.dtype))
    return d_buffer, d_gates


@_combine_backward_op.register_fake
def _(d_y, buffer, slots, gates):
    return buffer.new_empty(buffer.shape), gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_y):
    buffer, slots, gates = ctx.saved_tensors
    if differs_backward():
        d_buffer, d_gates = twin_gradients(lambda b, g: combine_reference(b, slots, g), (buffer, gates), (d_y,))
        return d_buffer, None, d_gates
    d_buffer, d_gates = torch.ops.vmoe.combine_backward(d_y.contiguous(), buffer, slots, gates)
    return d_buffer, None, d_gates


_combine_op.register_autograd(_backward, setup_context=_setup_context)
_combine_op.register_vmap(vmap.combine)


def combine(buffer: Tensor, slots: Tensor, gates: Tensor, *, impl: str = "auto") -> Tensor:
    """Sums each token's expert outputs, weighted by its gates.

    Args:
        buffer: (N, D) expert outputs; N = E * R rows.
        slots: (T, K) int32 row of each choice, unique, or -1 where dropped.
        gates: (T, K) weights, not renormalised over kept choices.
        impl: "auto", "triton" or "reference".

    Returns:
        (T, D) in the dtype of `buffer`, accumulated in float32 (float64 for float64); tokens whose choices were all
        dropped are 0.

    Raises:
        ValueError: if shapes, devices or the dtype of slots disagree, or N is 2**31 or more.
    """
    check_floating(buffer=buffer, gates=gates)
    if buffer.ndim != 2:
        raise ValueError(f"buffer must be (N, D), got {tuple(buffer.shape)}")
    if gates.shape != slots.shape:
        raise ValueError(f"gates must have the shape of slots {tuple(slots.shape)}, got {tuple(gates.shape)}")
    check_slots(slots, gates.shape[0], buffer.device)
    check_rows(buffer.shape[0])
    if use_reference(impl, buffer, gates):
        return combine_reference(buffer, slots, gates)
    return torch.ops.vmoe.combine(buffer, slots, gates)


if HAS_TRITON:
    from vmoe_kernels.rows.triton_combine_backward import combine_backward_triton
    from vmoe_kernels.rows.triton_move import combine_triton

    register_triton(_combine_op, combine_triton)
    register_triton(_combine_backward_op, combine_backward_triton)
