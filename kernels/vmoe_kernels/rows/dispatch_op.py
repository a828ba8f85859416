"""Dispatch: every kept choice's token is copied to its row of the expert buffer; empty rows are zero.

Dims: T tokens, K choices per token, N rows of the buffer (E * R), D width.
"""

import torch
from torch import Tensor

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_integer, check_rows
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    check_floating,
    check_slots,
    no_autocast,
    register_triton,
    use_reference,
)
from vmoe_kernels.common.transforms import differs_backward, twin_gradients


@no_autocast
def dispatch_reference(x: Tensor, slots: Tensor, num_rows: int) -> Tensor:
    """Eager twin of `dispatch`: dropped choices land in a row that is cut off."""
    rows = torch.where(slots < 0, num_rows, slots).long().reshape(-1)
    copies = x.repeat_interleave(slots.shape[1], 0)
    return x.new_zeros(num_rows + 1, x.shape[1]).index_add(0, rows, copies)[:num_rows]


def choice_of_row(slots: Tensor, num_rows: int) -> Tensor:
    """(N,) int64: the flat choice t * K + k that holds each row, or -1 where the row is empty."""
    rows = torch.where(slots < 0, num_rows, slots).long().reshape(-1)
    choices = torch.full((num_rows + 1,), -1, device=slots.device, dtype=torch.int64)
    choices[rows] = torch.arange(rows.numel(), device=slots.device)
    return choices[:num_rows]


@torch.library.custom_op("vmoe::dispatch", mutates_args=(), device_types="cpu")
def _dispatch_op(x: Tensor, slots: Tensor, num_rows: int) -> Tensor:
    choices = choice_of_row(slots, num_rows)
    filled = (choices >= 0).nonzero().squeeze(1)
    buffer = x.new_zeros(num_rows, x.shape[1])
    return buffer.index_copy_(0, filled, x.index_select(0, choices[filled] // slots.shape[1]))


@_dispatch_op.register_fake
def _(x, slots, num_rows):
    return x.new_empty((num_rows, x.shape[1]))


@torch.library.custom_op("vmoe::dispatch_backward", mutates_args=(), device_types="cpu")
def _dispatch_backward_op(d_buffer: Tensor, slots: Tensor) -> Tensor:
    d_x = torch.zeros((slots.shape[0], d_buffer.shape[1]), dtype=torch.float32).to(
        torch.promote_types(torch.float32, d_buffer.dtype)
    )
    for rank in range(slots.shape[1]):
        kept = (slots[:, rank] >= 0).nonzero().squeeze(1)
        d_x.index_add_(0, kept, d_buffer.index_select(0, slots[kept, rank].long()).to(d_x.dtype))
    return d_x.to(d_buffer.dtype)


@_dispatch_backward_op.register_fake
def _(d_buffer, slots):
    return d_buffer.new_empty((slots.shape[0], d_buffer.shape[1]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward(ctx, d_buffer):
    (slots,) = ctx.saved_tensors
    if differs_backward():
        # Dispatch is linear: its gradient is the same at any x.
        x = d_buffer.new_zeros(slots.shape[0], d_buffer.shape[1], requires_grad=True)
        (d_x,) = twin_gradients(lambda x: dispatch_reference(x, slots, d_buffer.shape[0]), (x,), (d_buffer,))
        return d_x, None, None
    return torch.ops.vmoe.dispatch_backward(d_buffer.contiguous(), slots), None, None


_dispatch_op.register_autograd(_backward, setup_context=_setup_context)
_dispatch_op.register_vmap(vmap.dispatch)


def dispatch(x: Tensor, slots: Tensor, num_rows: int, *, impl: str = "auto") -> Tensor:
    """Copies every kept choice's token to its row of the expert buffer.

    Args:
        x: (T, D) tokens.
        slots: (T, K) int32 row of each choice, unique, in 0..num_rows-1, or -1 where dropped.
        num_rows: N, rows of the buffer (E * R).
        impl: "auto", "triton" or "reference".

    Returns:
        (N, D) in the dtype of `x`; rows that no choice holds are 0.

    Raises:
        ValueError: if shapes, devices or the dtype of slots disagree, or num_rows is negative, or 2**31 or more.
    """
    check_floating(x=x)
    if x.ndim != 2:
        raise ValueError(f"x must be (T, D), got {tuple(x.shape)}")
    check_slots(slots, x.shape[0], x.device)
    num_rows = check_integer("num_rows", num_rows, 0)
    check_rows(num_rows)
    if use_reference(impl, x):
        return dispatch_reference(x, slots, num_rows)
    return torch.ops.vmoe.dispatch(x, slots, num_rows)


if HAS_TRITON:
    from vmoe_kernels.rows.triton_move import dispatch_backward_triton, dispatch_triton

    register_triton(_dispatch_op, dispatch_triton)
    register_triton(_dispatch_backward_op, dispatch_backward_triton)
