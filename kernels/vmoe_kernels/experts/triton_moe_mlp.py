"""Launchers of `moe_mlp`, `dropless_mlp` and their backwards in Triton: the GEMMs gather, no buffer of tokens is made.

Dims: T tokens, K choices per token, E experts, R rows per expert, N = E * R, D width in, H hidden width, O width out.
"""

import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_triton_dtypes
from vmoe_kernels.common.groups import dropless_rows
from vmoe_kernels.common.impl import ROW_TILE, no_autocast
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table
from vmoe_kernels.experts.triton_buffer import Buffer, Rows
from vmoe_kernels.experts.triton_expert_mlp import check_sizes, experts_backward, run_experts
from vmoe_kernels.experts.types import Activation, ExpertWeights, bundle
from vmoe_kernels.rows.triton_move import choice_of_row_triton, sum_rows


@triton.jit(do_not_specialize=["num_choices", "num_rows"])
def _gate_gradient_kernel(
    row_dots_ptr,  # (PARTS, N) float32
    bias_dots_ptr,  # (N,) float32, or None
    slots_ptr,  # (T * K,) int32
    d_gates_ptr,  # (T * K,) floating
    num_choices,
    num_rows,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a block of gates: the parts of each kept one's gradient, added up in order; 0 where dropped."""
    choices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + choices, mask=choices < num_choices, other=-1)
    kept = (slots >= 0) & (slots < num_rows)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(row_dots_ptr + tl.cast(part, tl.int64) * num_rows + slots, mask=kept, other=0.0)
    if bias_dots_ptr is not None:
        total += tl.load(bias_dots_ptr + slots, mask=kept, other=0.0)
    tl.store(d_gates_ptr + choices, total.to(d_gates_ptr.dtype.element_ty), mask=choices < num_choices)


# Predicted, nothing was measured yet: 25,088 choices make 196 programs, over one per multiprocessor.
register_table("gate_gradient", {(ANY, ANY, ANY): Config({"BLOCK": 128}, num_warps=4)})


def gate_gradient(row_dots: Tensor, bias_dots: Tensor | None, slots: Tensor, gates: Tensor) -> Tensor:
    """Gradient of each gate, <d_y, output of its choice>.

    Args:
        row_dots: (P, N) float32 parts of <d_y W2, hidden> for each row.
        bias_dots: (N,) float32, <d_y, b2> for each row, or None without a bias.
        slots: (T, K) int32 row of each choice, or -1 where dropped.
        gates: (T, K), for its dtype.

    Returns:
        (T, K), 0 where dropped.
    """
    d_gates = gates.new_empty(gates.shape)
    config = look_up("gate_gradient", gates.device)
    grid = (triton.cdiv(slots.numel(), config.constexprs["BLOCK"]),)
    parts, num_rows = row_dots.shape
    _gate_gradient_kernel[grid](
        row_dots, bias_dots, slots, d_gates, slots.numel(), num_rows, PARTS=parts, **config.kwargs()
    )
    return d_gates


@no_autocast
def moe_mlp_triton(x: Tensor, slots: Tensor, gates: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Launcher of `vmoe::moe_mlp`."""
    # Arguments that are their defaults are left out.
    *weights, rows, activation, drop, seed, save = arguments[:9]
    weights, activation = bundle(*weights, activation, drop, seed)
    check_sizes(rows, weights, activation)
    y, pre = _forward(x, _buffer(slots, weights, rows, *arguments[9:]), gates, weights, activation, save)
    return y, pre


@no_autocast
def moe_mlp_backward_triton(
    d_y: Tensor, x: Tensor, slots: Tensor, gates: Tensor, pre: Tensor, *arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of `vmoe::moe_mlp_backward`."""
    *weights, rows, activation, drop, seed = arguments[:8]
    weights, activation = bundle(*weights, activation, drop, seed)
    return _backward(d_y, x, _buffer(slots, weights, rows, *arguments[8:]), gates, pre, weights, activation)


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


def _buffer(slots: Tensor, weights: ExpertWeights, rows: int, choices: Tensor | None = None) -> Buffer:
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
    d_x = sum_rows("dispatch_backward", d_rows.flatten(0, 1), buffer.slots, None)
    return d_x, gate_gradient(*dots, buffer.slots, gates), *gradients
