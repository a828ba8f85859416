"""Bias, activation and dropout of an expert as kernels of their own, forward and backward: what follows a cuBLAS GEMM.

Dims: E experts, R rows per expert, W columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.launch import ANY, Config, look_up, register_table
from vmoe_kernels.experts.triton_epilogue import store_hidden, store_hidden_gradient, tile_mask, tile_rows
from vmoe_kernels.experts.types import Activation


@triton.jit(do_not_specialize=["num_rows"])
def _activation_kernel(
    raw_ptr,  # (E * R, W), becomes the pre-activation where pre_ptr is the same memory
    bias_ptr,  # (E, W), or None
    pre_ptr,  # (E * R, W), or None
    out_ptr,  # (E * R, W)
    choices_ptr,  # (E * R,) int32, or None
    seed_ptr,  # () int64, or None
    drop,
    num_rows,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program owns a (BLOCK_ROWS, BLOCK_COLS) tile of one expert: bias, activation and dropout in one pass."""
    col_tiles: tl.constexpr = (WIDTH + BLOCK_COLS - 1) // BLOCK_COLS
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    tile = tl.program_id(0).to(tl.int64)
    expert = tile // (row_tiles * col_tiles)
    tile_row, start = tile // col_tiles % row_tiles, tile % col_tiles * BLOCK_COLS
    place, _, choices = tile_rows(choices_ptr, expert, tile_row, num_rows, BLOCK_ROWS)
    held = choices >= 0
    cols = start + tl.arange(0, BLOCK_COLS)
    offsets = place * WIDTH + tl.arange(0, BLOCK_ROWS)[:, None] * WIDTH + cols[None, :]
    raw = tl.load(raw_ptr + offsets, mask=tile_mask(held, cols, WIDTH, BLOCK_COLS), other=0.0).to(tl.float32)
    draws = place - expert * num_rows + tl.arange(0, BLOCK_ROWS)
    store_hidden(
        raw, bias_ptr, pre_ptr, out_ptr, seed_ptr, drop, expert, expert, draws, place, held, start,
        ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK_COLS, 1, BLOCK_COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _activation_backward_kernel(
    d_hidden_ptr,  # (E * R, W)
    pre_ptr,  # (E * R, W)
    gates_ptr,  # (T * K,) floating, or None
    choices_ptr,  # (E * R,) int32, or None
    d_pre_ptr,  # (E * R, W), may be d_hidden_ptr's memory
    gated_ptr,  # (E * R, W)
    row_dots_ptr,  # (column tiles, E * R) float32, or None
    column_sums_ptr,  # (E, row tiles, W) float32, or None
    seed_ptr,  # () int64, or None
    drop,
    num_experts,
    num_rows,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program owns a (BLOCK_ROWS, BLOCK_COLS) tile of one expert, and the partial sums of its rows and columns."""
    col_tiles: tl.constexpr = (WIDTH + BLOCK_COLS - 1) // BLOCK_COLS
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    tile = tl.program_id(0).to(tl.int64)
    expert = tile // (row_tiles * col_tiles)
    tile_row, tile_col = tile // col_tiles % row_tiles, tile % col_tiles
    place, count, choices = tile_rows(choices_ptr, expert, tile_row, num_rows, BLOCK_ROWS)
    held = choices >= 0
    rows = tl.arange(0, BLOCK_ROWS)
    cols = tile_col * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = tile_mask(held, cols, WIDTH, BLOCK_COLS)
    offsets = place * WIDTH + rows[:, None] * WIDTH + cols[None, :]
    d_hidden = tl.load(d_hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gates = None
    if gates_ptr is not None:
        gates = tl.load(gates_ptr + choices, mask=held, other=0.0).to(tl.float32)
    if column_sums_ptr is not None:
        column_sums_ptr += (expert * row_tiles + tile_row) * WIDTH
    draws = place - expert * num_rows + rows
    row_dots = store_hidden_gradient(
        d_hidden, tl.zeros((BLOCK_ROWS,), tl.float32), gates, pre_ptr, d_pre_ptr, gated_ptr, column_sums_ptr,
        seed_ptr, drop, expert, draws, place, count, held, tile_col * BLOCK_COLS,
        ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK_COLS, 1, BLOCK_COLS,
    )  # fmt: skip
    if row_dots_ptr is not None:
        tl.store(row_dots_ptr + tile_col * num_experts * num_rows + place + rows, row_dots, mask=rows < count)


# Predicted, nothing was measured yet: one 16-byte load of 16-bit data per thread and row of 4 warps; the backward keeps
# three tiles in registers, so it takes fewer columns at once.
register_table(
    "activation",
    {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 16, "BLOCK_COLS": 256}, num_warps=4)},
    candidates=[Config({"BLOCK_ROWS": 8, "BLOCK_COLS": 512}, num_warps=4)],
)
# More rows per tile make fewer partial column sums: in float32 (E, R / 32, W) of 16-bit rows and (E, R / 16, W) of
# float32's are 1/16 of d_pre's bytes. 64 columns are a cache line of 16-bit data and leave registers for twice as many
# warps as 128 do; 32 rows of float32 would spill with Triton 3.6.
register_table(
    "activation_backward",
    {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 32, "BLOCK_COLS": 64}, num_warps=4)},
    candidates=[Config({"BLOCK_ROWS": rows, "BLOCK_COLS": 128}, num_warps=8) for rows in (32, 64)],
)
register_table(
    "activation_backward/fp32",
    {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 16, "BLOCK_COLS": 64}, num_warps=4)},
    candidates=[Config({"BLOCK_ROWS": 32, "BLOCK_COLS": 64}, num_warps=8)],
)


def activation_after_gemm(
    raw: Tensor,
    bias: Tensor | None,
    choices: Tensor | None,
    activation: Activation,
    save: bool,
) -> Tensor:
    """Bias, activation and dropout of what cuBLAS computed.

    Args:
        raw: (E, R, W); with `save` it becomes the pre-activation, else the result.
        bias: (E, W) or None.
        choices: (E * R,) int32, -1 where a row is empty, or None if all rows count; empty rows are left undefined.
        activation: and dropout.
        save: whether `raw` must hold the pre-activation.

    Returns:
        (E, R, W), the memory of `raw` without `save`.
    """
    num_experts, rows, width = raw.shape
    out = torch.empty_like(raw) if save else raw
    config = look_up("activation", raw.device)
    tiles = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]) * triton.cdiv(width, config.constexprs["BLOCK_COLS"])
    if num_experts * tiles > 0:
        _activation_kernel[(num_experts * tiles,)](
            raw, bias, raw if save else None, out, choices, activation.seed, activation.drop, rows,
            ACTIVATION=activation.name, WIDTH=width, **config.kwargs(),
        )  # fmt: skip
    return out


def hidden_gradient_outputs(
    pre: Tensor, config: Config, gated: bool, biased: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Memory for d_pre and gated (E, R, W), row_dots (column tiles, E * R) and column_sums (E, row tiles, W)."""
    num_experts, rows, width = pre.shape
    row_tiles = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"])
    col_tiles = triton.cdiv(width, config.constexprs["BLOCK_COLS"])
    row_dots = pre.new_empty(col_tiles, num_experts * rows, dtype=torch.float32) if gated else None
    column_sums = pre.new_empty(num_experts, row_tiles, width, dtype=torch.float32) if biased else None
    return torch.empty_like(pre), torch.empty_like(pre), row_dots, column_sums


def activation_backward_after_gemm(
    d_hidden: Tensor,
    pre: Tensor,
    gates: Tensor | None,
    choices: Tensor | None,
    biased: bool,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Backward of `activation_after_gemm` on what cuBLAS computed; arguments and results as `hidden_gradient`'s."""
    num_experts, rows, width = pre.shape
    config = look_up("activation_backward" + ("/fp32" if pre.dtype == torch.float32 else ""), pre.device)
    outputs = hidden_gradient_outputs(pre, config, gates is not None, biased)
    tiles = triton.cdiv(rows, config.constexprs["BLOCK_ROWS"]) * triton.cdiv(width, config.constexprs["BLOCK_COLS"])
    if num_experts * tiles > 0:
        _activation_backward_kernel[(num_experts * tiles,)](
            d_hidden, pre, gates, choices, *outputs, activation.seed, activation.drop, num_experts, rows,
            ACTIVATION=activation.name, WIDTH=width, **config.kwargs(),
        )  # fmt: skip
    return outputs
