"""Triton kernel of combine's backward.

Dims: T tokens, K choices per token, N rows of the buffer, D width.
It owns rows of the buffer rather than tokens: d_y, the buffer and d_buffer then pass once for both gradients, and a
gate's gradient is complete in the program that owns its row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_triton_dtypes
from vmoe_kernels.common.launch import ANY, CompileCase, Config, look_up, register_table
from vmoe_kernels.rows.triton_move import (
    COMPILED_SHAPES,
    POINTER_TYPES,
    choice_of_row_triton,
    dispatch_backward_bytes,
    dispatch_bytes,
    sum_rows_case,
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


def combine_bytes(num_tokens: int, num_choices: int, width: int, itemsize: int) -> int:
    """Bytes that a combine without drops must move: the held rows once, y once, slots and float32 gates."""
    return num_tokens * ((num_choices + 1) * width * itemsize + num_choices * 8)


def combine_backward_bytes(num_tokens: int, num_choices: int, num_rows: int, width: int, itemsize: int) -> int:
    """Bytes that combine's backward without drops must move: d_y, the held rows and d_buffer once.

    Slots, the map from rows to choices (filled, written, read), float32 gates and their gradients count once each.
    """
    rows = (num_tokens * (num_choices + 1) + num_rows) * width * itemsize
    return rows + num_tokens * num_choices * 12 + 3 * num_rows * 4


def _predicted_microseconds() -> dict[tuple[str, int], float]:
    predicted = {}
    tokens, width, itemsize = 25_088, 768, 2
    # E * R rows of 32 experts at capacity factor 1.05, in groups of 8 images.
    for num_choices, num_rows in ((1, 26_624), (2, 53_248)):
        moved = {
            "dispatch": dispatch_bytes(tokens, num_choices, num_rows, width, itemsize),
            "dispatch_backward": dispatch_backward_bytes(tokens, num_choices, width, itemsize),
            "combine": combine_bytes(tokens, num_choices, width, itemsize),
            "combine_backward": combine_backward_bytes(tokens, num_choices, num_rows, width, itemsize),
        }
        predicted |= {(op, num_choices): size / H200_BYTES_PER_MICROSECOND for op, size in moved.items()}
    return predicted


# A large copy's rate on the H200, 4.3 TB/s.
H200_BYTES_PER_MICROSECOND = 4.3e6
# Predicted, not measured: least time of each (op, K) on an H200, bfloat16, T=25,088, D=768, no choice dropped. Launches
# (dispatch and combine's backward have three: fill, invert, move) come on top.
PREDICTED_MICROSECONDS = _predicted_microseconds()


def _compile_cases() -> list[CompileCase]:
    cases = []
    for dtype in POINTER_TYPES:
        pointer = f"*{dtype}"
        for width, num_choices in COMPILED_SHAPES:
            shape = {"K": num_choices, "D": width}
            suffix = f"{dtype}/D{width}/K{num_choices}"
            cases.append(sum_rows_case("combine", suffix, pointer, "*fp32", shape))
            config = look_up("combine_backward", torch.device("cpu"), width_bucket(width))
            signature = {
                "d_y_ptr": pointer,
                "buffer_ptr": pointer,
                "gates_ptr": "*fp32",
                "choices_ptr": "*i32",
                "d_buffer_ptr": pointer,
                "d_gates_ptr": "*fp32",
                "num_rows": "i32",
            }
            constexprs = {**shape, **config.constexprs}
            cases.append(
                CompileCase(
                    f"combine_backward/{suffix}",
                    _combine_backward_kernel,
                    signature,
                    constexprs,
                    config.num_warps,
                    config.num_stages,
                )
            )
    return cases


COMPILE_CASES = _compile_cases()
