"""Triton kernel of combine's backward.

It owns rows of the buffer rather than tokens: d_y, the buffer and d_buffer then pass once for both gradients, and a
gate's gradient is complete in the program that owns its row.

Dims: T tokens, K choices per token, N rows of the buffer, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_triton_dtypes
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table
from vmoe_kernels.rows.triton_move import (
    choice_of_row_triton,
    width_bucket,
)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_backward_kernel(
    d_y_ptr,  # (T, D)
    buffer_ptr,  # (N, D)
    gates_ptr,  # (T * K,) floating
    choices_ptr,  # (N,) int32
    d_buffer_ptr,  # (N, D)
    d_gates_ptr,  # (T * K,) floating, holds 0 where dropped
    num_rows,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows of d_buffer, and the gradients of the gates that weigh them."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    choices = tl.load(choices_ptr + rows, mask=rows < num_rows, other=-1)
    held = choices >= 0
    tokens = (choices // K).to(tl.int64)
    gates = tl.load(gates_ptr + choices, mask=held, other=0.0).to(tl.float32)
    d_gates = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = held[:, None] & (cols < D)[None, :]
        d_y = tl.load(
            d_y_ptr + tokens[:, None] * D + cols[None, :],
            mask=inside,
            other=0.0,
            eviction_policy="evict_first" if K == 1 else "",
        ).to(tl.float32)
        offsets = rows[:, None] * D + cols[None, :]
        buffer = tl.load(buffer_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d_gates += tl.sum(d_y * buffer, 1)
        d_buffer = (d_y * gates[:, None]).to(d_buffer_ptr.dtype.element_ty)
        tl.store(d_buffer_ptr + offsets, d_buffer, mask=(rows < num_rows)[:, None] & (cols < D)[None, :])
    tl.store(d_gates_ptr + choices, d_gates.to(d_gates_ptr.dtype.element_ty), mask=held)


# Predicted, nothing was measured yet: a warp takes one row and sums its products without leaving the warp. 1024 columns
# hold a whole row of V-MoE-B (768), so all its loads are in flight before the first store; the idle lanes cost no
# traffic. Tiny widths take 32 rows: 64 spilled 8 bytes on sm_90.
_ROW_TILES = ((4, 1024), (8, 1024), (4, 256), (8, 256), (4, 512), (2, 2048))
_TALL = Config({"BLOCK_ROWS": 32, "BLOCK_D": 64}, num_warps=4)

_row_configs = [Config({"BLOCK_ROWS": rows, "BLOCK_D": width}, num_warps=4) for rows, width in _ROW_TILES]
register_table(
    "combine_backward", {(ANY, ANY, ANY): _row_configs[0], (ANY, ANY, "le64"): _TALL}, candidates=_row_configs[1:]
)


def combine_backward_triton(d_y: Tensor, buffer: Tensor, slots: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of `vmoe::combine_backward`."""
    check_triton_dtypes(buffer=buffer)
    num_rows, width = buffer.shape
    if slots.numel() == 0 or buffer.numel() == 0:
        return buffer.new_zeros(buffer.shape), gates.new_zeros(gates.shape)
    d_buffer = buffer.new_empty(num_rows, width)
    d_gates = gates.new_empty(gates.shape)
    config = look_up("combine_backward", buffer.device, width_bucket(width))
    grid = (triton.cdiv(num_rows, config.constexprs["BLOCK_ROWS"]),)
    _combine_backward_kernel[grid](
        d_y.contiguous(),
        buffer.contiguous(),
        gates.contiguous(),
        choice_of_row_triton(slots, num_rows, zero_dropped=d_gates),
        d_buffer,
        d_gates,
        num_rows,
        K=slots.shape[1],
        D=width,
        **config.kwargs(),
    )
    return d_buffer, d_gates
