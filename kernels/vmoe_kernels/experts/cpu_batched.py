"""Small problems on a CPU: one product for all experts, rows that stay empty included.

A library shares a product of a few hundred rows badly between threads; of many products each thread takes its own.

Dims: T tokens, K choices, E experts, R rows per expert, D width in, H hidden width, O width out.
"""

import functools

import torch
from torch import Tensor

from vmoe_kernels.experts.activations import activate
from vmoe_kernels.experts.cpu import row_blocks
from vmoe_kernels.experts.types import Activation, ExpertWeights

# Of few rows (up to 12 here), the last bit of a product depends on how many there are: the loops keep it from the empty
# ones. There is little to gain either.
_LEAST_ROWS = 48
# Floats of all hidden rows up to which this is faster than expert by expert, with one thread and with more.
_MOST_FLOATS = (1 << 20, 6 << 20)
# Empty rows cost as much as filled ones.
_MOST_ROWS = 1.25


@functools.cache
def most_floats() -> int:
    """Once and for all: a backward must find the rows where its forward left them."""
    return _MOST_FLOATS[torch.get_num_threads() > 1]


def takes(x: Tensor, slots: Tensor, weights: ExpertWeights, activation: Activation, rows: int) -> bool:
    """Whether this is the faster way: by shapes, dtype and dropout, whatever is in the tensors."""
    experts, hidden, _ = weights.fc1_weight.shape
    return (
        activation.seed is None
        and x.dtype in (torch.float32, torch.float64)
        and rows >= _LEAST_ROWS
        and experts * rows * hidden <= most_floats()
        and experts * rows <= _MOST_ROWS * slots.numel()
    )


def outputs(
    x: Tensor, slots: Tensor, gates: Tensor, weights: ExpertWeights, name: str, rows: int
) -> tuple[Tensor, Tensor]:
    """Gate * output of every filled row, summed for each token.

    Args:
        x: (T, D).
        slots: (T, K).
        gates: (T, K).
        weights: of all experts.
        name: of the activation.
        rows: of an expert.

    Returns:
        y (T, O), and the pre-activation (E, R, H).
    """
    experts, width, _ = weights.fc1_weight.shape
    buffer = torch.ops.vmoe.dispatch(x, slots, experts * rows).view(experts, rows, -1)
    pre = _linear(buffer, weights.fc1_weight, weights.fc1_bias)
    hidden = torch.empty_like(pre)
    for block in row_blocks(experts * rows, width):
        activate(name, pre.flatten(0, 1)[block], hidden.flatten(0, 1)[block])
    out = _linear(hidden, weights.fc2_weight, weights.fc2_bias)
    return torch.ops.vmoe.combine(out.flatten(0, 1), slots, gates), pre


def gradients(
    d_y: Tensor, x: Tensor, slots: Tensor, gates: Tensor, pre: Tensor, weights: ExpertWeights, name: str
) -> tuple[Tensor, Tensor, ExpertWeights]:
    """The way back: the gradients of x (T, D), gates (T, K) and the weights."""
    experts, rows, width = pre.shape
    # Dropped choices share a row past the last.
    held = torch.where(slots < 0, experts * rows, slots).long().flatten()
    gate = x.new_zeros(experts * rows + 1).index_copy_(0, held, gates.flatten().to(x.dtype))[:-1].unsqueeze(1)
    buffer, d_out = (torch.ops.vmoe.dispatch(each, slots, experts * rows).view(experts, rows, -1) for each in (x, d_y))
    hidden, slope = torch.empty_like(pre), torch.empty_like(pre)
    for block in row_blocks(experts * rows, width):
        activate(name, *(each.flatten(0, 1)[block] for each in (pre, hidden, slope)), gate[block])
    d_hidden = torch.bmm(d_out, weights.fc2_weight)
    d_gate = torch.linalg.vecdot(d_hidden, hidden)
    if weights.fc2_bias is not None:
        d_gate += torch.bmm(d_out, weights.fc2_bias.unsqueeze(2)).squeeze(2)
    d_gates = torch.cat((d_gate.flatten(), d_gate.new_zeros(1)))[held].view(gates.shape).to(gates.dtype)
    d_out.mul_(gate.view(experts, rows, 1))
    d_hidden.mul_(slope)
    sums = weights.new_gradients()
    torch.bmm(d_hidden.transpose(1, 2), buffer, out=sums.fc1_weight)
    torch.bmm(d_out.transpose(1, 2), hidden, out=sums.fc2_weight)
    for d_bias, d_rows in ((sums.fc1_bias, d_hidden), (sums.fc2_bias, d_out)):
        if d_bias.numel():
            torch.sum(d_rows, 1, out=d_bias)
    d_rows = torch.bmm(d_hidden, weights.fc1_weight).flatten(0, 1)
    return torch.ops.vmoe.dispatch_backward(d_rows, slots), d_gates, sums


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # aten's, as in cpu.py.
    if bias is None:
        return torch.ops.aten.bmm(x, weight.transpose(1, 2))
    return torch.ops.aten.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
