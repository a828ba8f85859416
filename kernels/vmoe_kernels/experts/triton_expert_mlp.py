"""Launchers of `expert_mlp` and its backward in Triton, and the sums over rows that complete the biases' gradients.

Dims: E experts, R rows per part of the buffer, D width in, H hidden width, O width out, P partial sums, W columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import MAX_DRAWS, check_triton_dtypes
from vmoe_kernels.common.impl import ROW_TILE, no_autocast
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table
from vmoe_kernels.experts.triton_buffer import Buffer, Rows
from vmoe_kernels.experts.triton_epilogue import tile_rows
from vmoe_kernels.experts.triton_gemm import linear
from vmoe_kernels.experts.triton_gradient import hidden_gradient, weight_gradient
from vmoe_kernels.experts.types import Activation, ExpertWeights, bundle, contiguous


@triton.jit(do_not_specialize=["num_rows"])
def _output_bias_kernel(
    d_out_ptr,  # (T, O) where a map is given, else (E * R, O)
    choices_ptr,  # (E * R,) int32, or None
    owners_ptr,  # (R / TILE,) int32 expert of each tile of one part, or None where part and expert are one
    gates_ptr,  # (T * K,) floating, or None
    bias_ptr,  # (E, O), or None
    row_dots_ptr,  # (E * R,) float32, or None
    column_sums_ptr,  # (E, P, O) float32
    num_rows,
    O: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows of one expert: their <d_out, bias>, and the column sums of gate * d_out."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    tile = tl.program_id(0).to(tl.int64)
    expert = tile // row_tiles
    place, count, choices = tile_rows(choices_ptr, expert, tile % row_tiles, num_rows, BLOCK_ROWS)
    if owners_ptr is not None:
        # Nobody reads the sums of rows that hold nothing.
        if tl.max(choices, 0) < 0:
            return
        expert = tl.load(owners_ptr + place // TILE).to(tl.int64)
    held = choices >= 0
    rows = tl.arange(0, BLOCK_ROWS)
    if choices_ptr is None:
        sources = place + rows
    else:
        sources = (choices // K).to(tl.int64)
    row_dots = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, O, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = held[:, None] & (cols < O)[None, :]
        d_out = tl.load(d_out_ptr + sources[:, None] * O + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if row_dots_ptr is not None:
            bias = tl.load(bias_ptr + expert * O + cols, mask=cols < O, other=0.0).to(tl.float32)
            row_dots += tl.sum(d_out * bias[None, :], 1)
        if gates_ptr is not None:
            d_out *= tl.load(gates_ptr + choices, mask=held, other=0.0).to(tl.float32)[:, None]
        tl.store(column_sums_ptr + tile * O + cols, tl.sum(d_out, 0), mask=cols < O)
    if row_dots_ptr is not None:
        tl.store(row_dots_ptr + place + rows, row_dots, mask=rows < count)


@triton.jit
def _sum_tile(
    parts_ptr,
    spans_ptr,
    out_ptr,
    tile,
    num_experts,
    num_parts,
    part_rows,
    WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One tile of `_sum_parts_kernel`, whose arguments these are."""
    col_tiles: tl.constexpr = (WIDTH + BLOCK_COLS - 1) // BLOCK_COLS
    expert = tile.to(tl.int64) // col_tiles
    cols = tile % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = expert * num_parts
    if spans_ptr is not None:
        row = tl.load(spans_ptr + expert).to(tl.int64)
        first = row // part_rows
        num_parts = tl.cdiv((tl.load(spans_ptr + num_experts + expert) - row).to(tl.int32), part_rows)
    parts_ptr += first * WIDTH
    total = tl.zeros((BLOCK_PARTS, BLOCK_COLS), tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        parts = start + tl.arange(0, BLOCK_PARTS)
        mask = (parts < num_parts)[:, None] & (cols < WIDTH)[None, :]
        total += tl.load(parts_ptr + parts[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + expert * WIDTH + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit(do_not_specialize=["num_experts", "num_parts", "part_rows", "other_num_parts", "other_part_rows"])
def _sum_parts_kernel(
    parts_ptr,  # (E, P, W) float32, or (P, W) where experts have spans
    out_ptr,  # (E, W)
    other_parts_ptr,  # the same of another sum, or None
    other_out_ptr,
    spans_ptr,  # (2, E) int32 first row of each expert, and past its last, or None
    num_experts,
    num_parts,
    part_rows,
    other_num_parts,
    other_part_rows,
    WIDTH: tl.constexpr,
    OTHER_WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program owns BLOCK_COLS columns of one expert in one of the sums, and adds up their parts in order."""
    tiles = num_experts * ((WIDTH + BLOCK_COLS - 1) // BLOCK_COLS)
    tile = tl.program_id(0)
    if tile < tiles:
        _sum_tile(
            parts_ptr, spans_ptr, out_ptr, tile, num_experts, num_parts, part_rows, WIDTH, BLOCK_PARTS, BLOCK_COLS
        )  # fmt: skip
    elif other_parts_ptr is not None:
        _sum_tile(
            other_parts_ptr, spans_ptr, other_out_ptr, tile - tiles, num_experts, other_num_parts, other_part_rows,
            OTHER_WIDTH, BLOCK_PARTS, BLOCK_COLS,
        )  # fmt: skip


# Predicted, nothing was measured yet: 32 rows make 784 programs at 25,088 rows; 256 columns of float32 would spill on
# sm_100.
register_table("output_bias", {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 32, "BLOCK_COLS": 128}, num_warps=4)})
register_table("sum_parts", {(ANY, ANY, ANY): Config({"BLOCK_PARTS": 32, "BLOCK_COLS": 64}, num_warps=4)})


def output_bias_parts(d_out: Rows, gates: Tensor | None, bias: Tensor, row_dots: Tensor | None) -> Tensor:
    """Parts of the second bias's gradient, and the bias's share of the gates' gradients.

    Args:
        d_out: rows of O columns.
        gates: (T, K) weights of the choices, or None for 1.
        bias: (E, O).
        row_dots: (E * R,) float32, which is filled with <d_out, bias>, or None.

    Returns:
        (parts of the buffer, P, O) float32, which `sum_parts` adds up: gate * d_out of the rows that hold something.
    """
    buffer, width = d_out.buffer, bias.shape[1]
    config = look_up("output_bias", bias.device)
    row_tiles = triton.cdiv(buffer.rows, config.constexprs["BLOCK_ROWS"])
    column_sums = bias.new_empty(buffer.parts, row_tiles, width, dtype=torch.float32)
    if buffer.parts * row_tiles > 0:
        _output_bias_kernel[(buffer.parts * row_tiles,)](
            d_out.data, buffer.choices, buffer.owners, gates, bias, row_dots, column_sums, buffer.rows,
            O=width, K=buffer.num_choices, TILE=ROW_TILE, **config.kwargs(),
        )  # fmt: skip
    return column_sums


def sum_parts(parts: Tensor, others: Tensor | None, dtype: torch.dtype, buffer: Buffer) -> tuple[Tensor, Tensor | None]:
    """Adds up float32 sums over rows, each in one order, one or two of them in a launch.

    Args:
        parts: (E, P, W), or (1, P, W) of a buffer with spans.
        others: the same with another P and W, or None.
        dtype: of the results.
        buffer: whose rows they are of.

    Returns:
        (E, W) each.
    """
    num_experts = buffer.num_experts
    sums = [each for each in (parts, others) if each is not None]
    outs = [each.new_empty(num_experts, each.shape[2], dtype=dtype) for each in sums]
    counts = [each.shape[1] for each in sums]
    rows = [buffer.rows // max(count, 1) for count in counts]
    config = look_up("sum_parts", parts.device)
    tiles = num_experts * sum(triton.cdiv(each.shape[2], config.constexprs["BLOCK_COLS"]) for each in sums)
    other = (others, outs[-1]) if others is not None else (None, None)
    if tiles > 0:
        _sum_parts_kernel[(tiles,)](
            parts, outs[0], *other, buffer.spans, num_experts, counts[0], rows[0], counts[-1], rows[-1],
            WIDTH=parts.shape[2], OTHER_WIDTH=0 if others is None else others.shape[2], **config.kwargs(),
        )  # fmt: skip
    return outs[0], other[1]


def check_sizes(rows: int, weights: ExpertWeights, activation: Activation) -> None:
    """The random stream of an expert counts its hidden activations in 32 bits."""
    hidden = weights.fc1_weight.shape[1]
    if activation.drop > 0 and rows * hidden >= MAX_DRAWS:
        raise ValueError(f"drop > 0 needs fewer than 2**32 hidden activations per expert, got {rows} * {hidden}")


@no_autocast
def expert_mlp_triton(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Launcher of `vmoe::expert_mlp`."""
    check_triton_dtypes(x=x)
    *arguments, save = arguments
    weights, activation = bundle(*arguments)
    buffer = Buffer(*x.shape[:2])
    check_sizes(buffer.rows, weights, activation)
    return run_experts(Rows(x.contiguous(), buffer), weights, activation, save)


def run_experts(x: Rows, weights: ExpertWeights, activation: Activation, save: bool) -> tuple[Tensor, Tensor]:
    """Both GEMMs: the outputs (E, R, O) and the pre-activation (E, R, H), or (E, 0, H) unless saved."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights.contiguous()
    hidden, pre = linear("expert_up", x, fc1_weight, fc1_bias, activation=activation, save=save)
    if pre is None:
        pre = hidden.new_empty(hidden.shape[0], 0, hidden.shape[2])
    out, _ = linear("expert_down", Rows(hidden, x.buffer), fc2_weight, fc2_bias)
    return out, pre


@no_autocast
def expert_mlp_backward_triton(
    d_out: Tensor, x: Tensor, pre: Tensor, *arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of `vmoe::expert_mlp_backward`."""
    check_triton_dtypes(x=x)
    buffer = Buffer(*x.shape[:2])
    d_out, x = Rows(d_out.contiguous(), buffer), Rows(x.contiguous(), buffer)
    d_x, gradients, _ = experts_backward(d_out, x, pre, None, *bundle(*arguments))
    return d_x, *gradients


def experts_backward(
    d_out: Rows, x: Rows, pre: Tensor, gates: Tensor | None, weights: ExpertWeights, activation: Activation
) -> tuple[Tensor, ExpertWeights, tuple[Tensor | None, Tensor | None]]:
    """Backward of `run_experts`, and of the gated sum of its outputs where gates are given.

    Returns:
        The gradient of the rows of x (E, R, D), undefined in empty rows; the gradients of the weights, empty where a
        bias is absent; and, with gates, float32 parts (P, E * R) and (E * R,) that add up to the gradient of the gate
        of each row, the second from the bias, None where there is none.
    """
    buffer, gates = x.buffer, contiguous(gates)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights.contiguous()
    d_pre, gated, row_dots, column_sums = hidden_gradient(
        d_out, fc2_weight, pre.contiguous(), gates, biased=fc1_bias is not None, activation=activation
    )
    bias_dots, output_sums = None, None
    if fc2_bias is not None:
        bias_dots = None if row_dots is None else row_dots.new_empty(row_dots.shape[1])
        output_sums = output_bias_parts(d_out, gates, fc2_bias, bias_dots)
    d_fc1_bias, d_fc2_bias = _bias_gradients(column_sums, output_sums, fc1_weight, buffer)
    gated, d_pre = Rows(gated, buffer), Rows(d_pre, buffer)
    d_fc2 = weight_gradient("expert_d_fc2", d_out, gated)
    d_fc1 = weight_gradient("expert_d_fc1", d_pre, x)
    d_x, _ = linear("expert_d_rows", d_pre, fc1_weight, None, transposed=True)
    return d_x, ExpertWeights(d_fc1, d_fc1_bias, d_fc2, d_fc2_bias), (row_dots, bias_dots)


def _bias_gradients(
    column_sums: Tensor | None, output_sums: Tensor | None, weight: Tensor, buffer: Buffer
) -> tuple[Tensor, Tensor]:
    """Gradients of both biases in the dtype of a weight, of parts of them; empty where there are none."""
    first = second = None
    if column_sums is not None:
        first, second = sum_parts(column_sums, output_sums, weight.dtype, buffer)
    elif output_sums is not None:
        second, _ = sum_parts(output_sums, None, weight.dtype, buffer)
    return tuple(weight.new_empty(0) if each is None else each for each in (first, second))
