"""Launchers of `moe_mlp`, `dropless_mlp` and their backwards in Triton: the GEMMs gather, no buffer of tokens is made.

Dims: T tokens, K choices per token, E experts, R rows per expert, N = E * R, D width in, H hidden width, O width out.
"""

from torch import Tensor

from vmoe_kernels.common.checks import check_triton_dtypes
from vmoe_kernels.common.groups import dropless_rows
from vmoe_kernels.common.impl import ROW_TILE, no_autocast
from vmoe_kernels.experts.triton_buffer import Buffer, Rows
from vmoe_kernels.experts.triton_expert_mlp import check_sizes, experts_backward, run_experts
from vmoe_kernels.experts.types import Activation, ExpertWeights, bundle
from vmoe_kernels.rows.triton_move import choice_of_row_triton, sum_rows, sum_rows_and_gates


@no_autocast
def moe_mlp_triton(
    x: Tensor,
    slots: Tensor,
    gates: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    rows: int,
    activation: str,
    drop: float,
    seed: Tensor | None,
    save: bool,
    choices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of `vmoe::moe_mlp`."""
    weights, activation = bundle(fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed)
    check_sizes(rows, weights, activation)
    return _forward(x, _buffer(slots, weights, rows, choices), gates, weights, activation, save)


@no_autocast
def moe_mlp_backward_triton(
    d_y: Tensor,
    x: Tensor,
    slots: Tensor,
    gates: Tensor,
    pre: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    rows: int,
    activation: str,
    drop: float,
    seed: Tensor | None,
    choices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of `vmoe::moe_mlp_backward`."""
    weights, activation = bundle(fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed)
    return _backward(d_y, x, _buffer(slots, weights, rows, choices), gates, pre, weights, activation)


@no_autocast
def dropless_mlp_triton(x: Tensor, slots: Tensor, spans: Tensor, gates: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Launcher of `vmoe::dropless_mlp`."""
    *arguments, save = arguments
    weights, activation = bundle(*arguments)
    y, pre = _forward(x, _dropless_buffer(slots, spans), gates, weights, activation, save)
    return y, pre.flatten(0, 1)


@no_autocast
def dropless_mlp_backward_triton(
    d_y: Tensor, x: Tensor, slots: Tensor, spans: Tensor, gates: Tensor, pre: Tensor, *arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of `vmoe::dropless_mlp_backward`."""
    weights, activation = bundle(*arguments)
    return _backward(d_y, x, _dropless_buffer(slots, spans), gates, pre.unsqueeze(0), weights, activation)


def _buffer(slots: Tensor, weights: ExpertWeights, rows: int, choices: Tensor | None) -> Buffer:
    slots, num_experts = slots.contiguous(), weights.fc1_weight.shape[0]
    if choices is None:
        choices = choice_of_row_triton(slots, num_experts * rows)
    return Buffer(num_experts, rows, slots, choices.contiguous())


def _dropless_buffer(slots: Tensor, spans: Tensor) -> Buffer:
    slots, num_experts = slots.contiguous(), spans.shape[1]
    rows = dropless_rows(slots.numel(), num_experts, ROW_TILE)
    return Buffer(num_experts, rows, slots, choice_of_row_triton(slots, rows), spans.contiguous())


def _forward(
    x: Tensor, buffer: Buffer, gates: Tensor, weights: ExpertWeights, activation: Activation, save: bool
) -> tuple[Tensor, Tensor]:
    """The gated sum (T, O), and the pre-activation (parts, R, H), or (parts, 0, H) unless saved."""
    check_triton_dtypes(x=x)
    out, pre = run_experts(Rows(x.contiguous(), buffer, gather=True), weights, activation, save)
    return sum_rows("combine", out.flatten(0, 1), buffer.slots, gates), pre


def _backward(
    d_y: Tensor,
    x: Tensor,
    buffer: Buffer,
    gates: Tensor,
    pre: Tensor,
    weights: ExpertWeights,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the gates and of the weights."""
    check_triton_dtypes(x=x)
    d_y, x = Rows(d_y.contiguous(), buffer, gather=True), Rows(x.contiguous(), buffer, gather=True)
    d_rows, gradients, dots = experts_backward(d_y, x, pre, gates, weights, activation)
    return *sum_rows_and_gates(d_rows.flatten(0, 1), buffer.slots, *dots, gates), *gradients
