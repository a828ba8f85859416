"""Triton kernels that move rows: dispatch, combine, dispatch's backward, and the map from rows to choices they share.

Dims: T tokens, K choices per token, N rows of the buffer, D width.
An output row belongs to one program, which writes all of it: nothing is added atomically, empty rows are zeroed in the
same pass, and no row is read that no choice holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_choices, check_triton_dtypes
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table, size_bucket

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
    """A program owns a block of choices: a kept one names itself in its row, a dropped one gets 0 in dropped_ptr."""
    choices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + choices, mask=choices < num_choices, other=-1)
    # A slot past the buffer breaks the contract; it counts as dropped and never reaches memory.
    kept = (slots >= 0) & (slots < num_rows)
    tl.store(choices_ptr + slots, choices.to(tl.int32), mask=kept)
    if dropped_ptr is not None:
        zeros = tl.zeros((BLOCK,), dropped_ptr.dtype.element_ty)
        tl.store(dropped_ptr + choices, zeros, mask=(choices < num_choices) & ~kept)


@triton.jit(do_not_specialize=["num_rows"])
def _dispatch_kernel(
    x_ptr,  # (T, D)
    choices_ptr,  # (N,) int32
    buffer_ptr,  # (N, D)
    num_rows,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a (BLOCK_ROWS, BLOCK_D) tile of the buffer: the token that holds each row, or 0."""
    # The tiles of one row are neighbours in launch order, so a token's memory pages are read together.
    tiles_per_row: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile = tl.program_id(0).to(tl.int64)
    rows = tile // tiles_per_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tile % tiles_per_row * BLOCK_D + tl.arange(0, BLOCK_D)
    choices = tl.load(choices_ptr + rows, mask=rows < num_rows, other=-1)
    tokens = (choices // K).to(tl.int64)
    # A token that only one row can hold is read once: it should not push the buffer out of the L2 cache.
    copies = tl.load(
        x_ptr + tokens[:, None] * D + cols[None, :],
        mask=(choices >= 0)[:, None] & (cols < D)[None, :],
        other=0.0,
        eviction_policy="evict_first" if K == 1 else "",
    )
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    tl.store(buffer_ptr + rows[:, None] * D + cols[None, :], copies, mask=inside)


@triton.jit
def _sum_of_parts(parts_ptr, rows, mask, num_rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) sums over (PARTS, N) float32 at some rows, always taken in the same order; 0 off the mask."""
    block_parts: tl.constexpr = 32
    total = tl.zeros((BLOCK, block_parts), tl.float32)
    for start in tl.static_range(0, PARTS, block_parts):
        parts = start + tl.arange(0, block_parts)
        pointers = parts_ptr + (parts.to(tl.int64) * num_rows)[None, :] + rows[:, None]
        total += tl.load(pointers, mask=mask[:, None] & (parts < PARTS)[None, :], other=0.0)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _sum_rows_kernel(
    rows_ptr,  # (N, D)
    slots_ptr,  # (T, K) int32
    gates_ptr,  # (T, K) floating, or None for gates of 1
    y_ptr,  # (T, D)
    row_dots_ptr,  # (PARTS, N) float32, or None
    bias_dots_ptr,  # (N,) float32, or None
    d_gates_ptr,  # (T, K) floating, or None
    num_tokens,
    num_rows,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a (BLOCK_TOKENS, BLOCK_D) tile of y: the gated sum, in float32, of the rows of its K choices.

    With row_dots the program of a token's first tile owns its gates' gradients, too: the sums of their parts.
    """
    tiles_per_row: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile = tl.program_id(0).to(tl.int64)
    tokens = tile // tiles_per_row * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    cols = tile % tiles_per_row * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        choices = tokens * K + k
        slots = tl.load(slots_ptr + choices, mask=tokens < num_tokens, other=-1)
        kept = (slots >= 0) & (slots < num_rows)
        # Slots are unique, so a row is read once.
        row = tl.load(
            rows_ptr + slots.to(tl.int64)[:, None] * D + cols[None, :],
            mask=kept[:, None] & (cols < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        if gates_ptr is not None:
            # Dropped choices too: 0 times a NaN gate must show.
            row *= tl.load(gates_ptr + choices, mask=tokens < num_tokens, other=0.0).to(tl.float32)[:, None]
        total += row
        if d_gates_ptr is not None:  # noqa: SIM102
            if tile % tiles_per_row == 0:
                d_gate = _sum_of_parts(row_dots_ptr, slots, kept, num_rows, PARTS, BLOCK_TOKENS)
                if bias_dots_ptr is not None:
                    d_gate += tl.load(bias_dots_ptr + slots, mask=kept, other=0.0)
                tl.store(d_gates_ptr + choices, d_gate.to(d_gates_ptr.dtype.element_ty), mask=tokens < num_tokens)
    inside = (tokens < num_tokens)[:, None] & (cols < D)[None, :]
    tl.store(y_ptr + tokens[:, None] * D + cols[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


WIDTH_BOUNDS = (64,)


def width_bucket(width: int) -> str:
    """Names the bucket of D in the launch tables of dispatch and combine."""
    return size_bucket(width, WIDTH_BOUNDS)


# Predicted, nothing was measured yet: 256 columns are one 16-byte load per thread of a warp in 16-bit data and divide
# 768, 1024 and 1280; 16 rows give each thread of 4 warps four such loads in flight, and with the occupancy that the
# registers allow that is over the 25 KB per SM that latency times bandwidth asks of an H200.
_TILES = ((16, 256), (8, 256), (32, 256), (4, 1024), (8, 512), (16, 128))


def _configs(rows_name: str) -> list[Config]:
    return [Config({rows_name: rows, "BLOCK_D": width}, num_warps=4) for rows, width in _TILES]


def register_tile_table(op: str, rows_name: str) -> None:
    """Gives a kernel with (rows, BLOCK_D) tiles its table: the wide tile, and a tall one where D is tiny."""
    wide, *others = _configs(rows_name)
    tall = Config({rows_name: 64, "BLOCK_D": 64}, num_warps=4)
    register_table(op, {(ANY, ANY, ANY): wide, (ANY, ANY, "le64"): tall}, candidates=others)


register_tile_table("dispatch", "BLOCK_ROWS")
register_tile_table("dispatch_backward", "BLOCK_TOKENS")
register_tile_table("combine", "BLOCK_TOKENS")


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
    check_choices(slots)
    num_choices = slots.numel()
    choices = torch.full((num_rows,), -1, device=slots.device, dtype=torch.int32)
    if num_choices > 0:
        grid = (triton.cdiv(num_choices, BLOCK_CHOICES),)
        _choice_of_row_kernel[grid](
            slots.contiguous(), choices, zero_dropped, num_choices, num_rows, BLOCK=BLOCK_CHOICES, num_warps=4
        )
    return choices


def sum_rows(op: str, rows: Tensor, slots: Tensor, gates: Tensor | None) -> Tensor:
    """Adds up the rows of each token's choices: dispatch's backward, and combine.

    Args:
        op: name of the launch table.
        rows: (N, D) float16, bfloat16 or float32.
        slots: (T, K) int32 row of each choice, or -1 where dropped.
        gates: (T, K) weights, or None for 1.

    Returns:
        (T, D) in the dtype of `rows`, accumulated in float32 in the order of the choices.
    """
    y = rows.new_empty(slots.shape[0], rows.shape[1])
    _launch_sum_rows(op, rows, slots, gates, y)
    return y


def sum_rows_and_gates(
    rows: Tensor, slots: Tensor, row_dots: Tensor, bias_dots: Tensor | None, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """`sum_rows` for dispatch's backward and, in the same launch, each gate's gradient <d_y, output of its choice>.

    Args:
        rows: (N, D) as in `sum_rows`.
        slots: (T, K) int32.
        row_dots: (P, N) float32 parts of <d_y W2, hidden> for each row.
        bias_dots: (N,) float32, <d_y, b2> for each row, or None without a bias.
        gates: (T, K), for its dtype.

    Returns:
        The sums (T, D), and (T, K) gradients, 0 where dropped.
    """
    y, d_gates = rows.new_empty(slots.shape[0], rows.shape[1]), gates.new_empty(gates.shape)
    _launch_sum_rows("dispatch_backward", rows, slots, None, y, row_dots, bias_dots, d_gates)
    return y, d_gates


def _launch_sum_rows(
    op: str,
    rows: Tensor,
    slots: Tensor,
    gates: Tensor | None,
    y: Tensor,
    row_dots: Tensor | None = None,
    bias_dots: Tensor | None = None,
    d_gates: Tensor | None = None,
) -> None:
    if y.numel() == 0:
        return
    (num_tokens, num_choices), (num_rows, width) = slots.shape, rows.shape
    config = look_up(op, rows.device, width_bucket(width))
    tiles = triton.cdiv(num_tokens, config.constexprs["BLOCK_TOKENS"])
    _sum_rows_kernel[(tiles * triton.cdiv(width, config.constexprs["BLOCK_D"]),)](
        rows.contiguous(),
        slots.contiguous(),
        None if gates is None else gates.contiguous(),
        y,
        row_dots,
        bias_dots,
        d_gates,
        num_tokens,
        num_rows,
        PARTS=0 if row_dots is None else row_dots.shape[0],
        K=num_choices,
        D=width,
        **config.kwargs(),
    )


def dispatch_triton(x: Tensor, slots: Tensor, num_rows: int) -> Tensor:
    """Launcher of `vmoe::dispatch`."""
    check_triton_dtypes(x=x)
    width = x.shape[1]
    if slots.numel() == 0:
        return x.new_zeros(num_rows, width)
    buffer = x.new_empty(num_rows, width)
    if buffer.numel() > 0:
        config = look_up("dispatch", x.device, width_bucket(width))
        tiles = triton.cdiv(num_rows, config.constexprs["BLOCK_ROWS"])
        grid = (tiles * triton.cdiv(width, config.constexprs["BLOCK_D"]),)
        choices = choice_of_row_triton(slots, num_rows)
        _dispatch_kernel[grid](x.contiguous(), choices, buffer, num_rows, K=slots.shape[1], D=width, **config.kwargs())
    return buffer


def dispatch_backward_triton(d_buffer: Tensor, slots: Tensor) -> Tensor:
    """Launcher of `vmoe::dispatch_backward`."""
    check_triton_dtypes(d_buffer=d_buffer)
    return sum_rows("dispatch_backward", d_buffer, slots, None)


def combine_triton(buffer: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """Launcher of `vmoe::combine`."""
    check_triton_dtypes(buffer=buffer)
    return sum_rows("combine", buffer, slots, gates)
