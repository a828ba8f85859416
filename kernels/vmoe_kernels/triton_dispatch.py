"""Triton kernels of dispatch and its backward.

Dims: T tokens, K choices per token, N rows of the buffer, D width.
Rows are the unit of work: an output row belongs to one program, so nothing is added atomically and every row,
empty ones included, is written exactly once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CHOICES = 1024


@triton.jit(do_not_specialize=["num_choices", "num_rows"])
def _choice_of_row_kernel(
    slots_ptr,  # (T * K,) int32
    choices_ptr,  # (N,) int32, holds -1
    dropped_ptr,  # (T * K,) floating, or None
    num_choices,
    num_rows,
    BLOCK: tl.constexpr,
):
    """A program owns a block of choices: kept ones write themselves to their row, dropped ones 0 to dropped_ptr."""
    choices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + choices, mask=choices < num_choices, other=-1)
    kept = (slots >= 0) & (slots < num_rows)
    tl.store(choices_ptr + slots, choices.to(tl.int32), mask=kept)
    if dropped_ptr is not None:
        zeros = tl.zeros((BLOCK,), dropped_ptr.dtype.element_ty)
        tl.store(dropped_ptr + choices, zeros, mask=(choices < num_choices) & (slots < 0))


def choice_of_row_triton(slots: Tensor, num_rows: int, zero_dropped: Tensor | None = None) -> Tensor:
    """Inverts the slots: which choice holds each row of the buffer.

    Args:
        slots: (T, K) int32 row of each choice, unique, or -1 where dropped.
        num_rows: N, rows of the buffer.
        zero_dropped: (T, K) contiguous; written in the same pass, to 0 where a choice was dropped.

    Returns:
        (N,) int32: the flat choice t * K + k, or -1 where the row is empty.

    Raises:
        ValueError: if T * K does not fit in int32.
    """
    num_choices = slots.numel()
    if num_choices >= 2**31:
        raise ValueError(f"slots must hold fewer than 2**31 choices, got {num_choices}")
    choices = torch.full((num_rows,), -1, device=slots.device, dtype=torch.int32)
    if num_choices > 0:
        grid = (triton.cdiv(num_choices, BLOCK_CHOICES),)
        _choice_of_row_kernel[grid](
            slots.contiguous(), choices, zero_dropped, num_choices, num_rows, BLOCK=BLOCK_CHOICES, num_warps=4
        )
    return choices
