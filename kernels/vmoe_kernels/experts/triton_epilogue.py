"""What happens to a tile between the GEMMs of an expert, for Triton kernels: bias, activation, dropout, and backward.

The same code runs in the epilogue of our GEMMs (`triton_expert_gemm`, `triton_expert_gradient`) and, where cuBLAS was
chosen for the GEMM, in a kernel of its own (`triton_expert_activation`).

Dims: E experts, R rows per expert, W columns.
"""

import torch
import triton
import triton.language as tl

# tanh GELU is x * sigmoid(x * (_A + _B * x^2)), which needs no tanh.
_A = tl.constexpr(2.0 * (2.0 / torch.pi) ** 0.5)
_B = tl.constexpr(2.0 * (2.0 / torch.pi) ** 0.5 * 0.044715)
_SQRT_HALF = tl.constexpr(0.5**0.5)
_INV_SQRT_2PI = tl.constexpr((2.0 * torch.pi) ** -0.5)


@triton.jit
def _activate(x, NAME: tl.constexpr):
    """The activation of a float32 tile; "none" leaves it as it is."""
    if NAME == "gelu_tanh":
        y = x * tl.sigmoid(x * (_A + _B * x * x))
    elif NAME == "gelu":
        y = x * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF))
    elif NAME == "relu":
        # A NaN is not below 0 and stays.
        y = tl.where(x < 0, 0.0, x)
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(NAME == "none", "unknown activation")
        y = x
    return y


@triton.jit
def _activate_with_slope(x, NAME: tl.constexpr):
    """The activation of a float32 tile, and its derivative."""
    if NAME == "gelu_tanh":
        square = x * x
        s = tl.sigmoid(x * (_A + _B * square))
        y = x * s
        slope = s + s * (1.0 - s) * x * (_A + 3.0 * _B * square)
    elif NAME == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        y = x * below
        slope = below + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        s = tl.sigmoid(x)
        y = x * s
        slope = s * (1.0 + x * (1.0 - s))
    return y, slope


@triton.jit
def _dropout_scale(seed_ptr, drop, stream, draws, cols, WIDTH: tl.constexpr):
    """0 where dropped, else 1 / (1 - drop): the stream and offsets of `philox.dropout_keep` on CUDA."""
    offsets = draws[:, None] * WIDTH + cols[None, :]
    uniform = tl.rand(tl.load(seed_ptr) + stream, offsets.to(tl.uint32))
    return tl.where(uniform >= drop, 1.0 / (1.0 - drop), 0.0)


@triton.jit
def tile_rows(choices_ptr, expert, tile_row, num_rows, BLOCK_ROWS: tl.constexpr):
    """Place in the buffer of a tile's first row, how many rows it has, and the choices that hold them.

    Rows count from the first, so that offsets within a tile fit in 32 bits. A choice is -1 where the row is empty or
    past the end; without a map every row holds something.
    """
    first = tile_row * BLOCK_ROWS
    place = expert * num_rows + first
    count = num_rows - first
    rows = tl.arange(0, BLOCK_ROWS)
    if choices_ptr is None:
        choices = tl.where(rows < count, rows, -1)
    else:
        choices = tl.load(choices_ptr + place + rows, mask=rows < count, other=-1)
    return place, count, choices


@triton.jit
def tile_owner(owners_ptr, expert, place, num_rows, choices, BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr):
    """The expert whose weights a tile meets; the stream, and the rows in it, of its random numbers.

    Without a map that is the expert whose part of the buffer the tile is in, and its rows count. A dropless buffer is
    one part with a map, (N / TILE,) int32: a stream for all, in which choices count.
    """
    if owners_ptr is None:
        owner, stream = expert, expert
        draws = place - expert * num_rows + tl.arange(0, BLOCK_ROWS)
    else:
        owner, stream = tl.load(owners_ptr + place // TILE).to(tl.int64), tl.zeros((), tl.int64)
        draws = choices.to(tl.int64)
    return owner, stream, draws


@triton.jit
def tile_mask(row_mask, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that count and columns that exist; whole tiles of BLOCK columns need no mask, which would cost registers."""
    mask = row_mask[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return mask


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a (ROWS, COLS) tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def store_hidden(
    tile,  # (BLOCK_ROWS, BLOCK) float32
    bias_ptr,  # (E, W), or None
    pre_ptr,  # (E * R, W), or None
    out_ptr,  # (E * R, W)
    seed_ptr,  # () int64, or None
    drop,
    owner,
    stream,
    draws,
    place,
    held,
    start,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds the bias to a tile that starts at a column, stores it where asked, and stores its activation.

    PARTS, a power of two, are done one after the other: a whole wide tile does not fit in registers. TILE is the width
    of the whole: a part may lie past the last column though its own width divides it.
    """
    if PARTS > 1:
        left, right = _halves(tile, BLOCK_ROWS, BLOCK)
        store_hidden(
            left, bias_ptr, pre_ptr, out_ptr, seed_ptr, drop, owner, stream, draws, place, held,
            start, ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,
        )  # fmt: skip
        store_hidden(
            right, bias_ptr, pre_ptr, out_ptr, seed_ptr, drop, owner, stream, draws, place, held,
            start + BLOCK // 2, ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,
        )  # fmt: skip
        return
    cols = start + tl.arange(0, BLOCK)
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + owner * WIDTH + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]
    first = place * WIDTH
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * WIDTH + cols[None, :]
    mask = tile_mask(held, cols, WIDTH, TILE)
    if pre_ptr is not None:
        tl.store(pre_ptr + first + offsets, tile.to(pre_ptr.dtype.element_ty), mask=mask)
    hidden = _activate(tile, ACTIVATION)
    if seed_ptr is not None:
        hidden *= _dropout_scale(seed_ptr, drop, stream, draws, cols, WIDTH)
    tl.store(out_ptr + first + offsets, hidden.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_hidden_gradient(
    d_hidden,  # (BLOCK_ROWS, BLOCK) float32
    gates,  # (BLOCK_ROWS,) float32, or None for 1
    pre_ptr,  # (E * R, W)
    d_pre_ptr,  # (E * R, W)
    gated_ptr,  # (E * R, W)
    column_sums_ptr,  # (W,) float32 of this tile of rows, or None
    seed_ptr,  # () int64, or None
    drop,
    stream,
    draws,
    place,
    count,
    held,
    start,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Recomputes a tile of the hidden activations; stores gate * hidden, d_pre and the column sums of d_pre.

    Empty rows get zeros in both, as the weight gradients read them. Returns <d_hidden, hidden> of each row. PARTS as
    in `store_hidden`.
    """
    if PARTS > 1:
        left, right = _halves(d_hidden, BLOCK_ROWS, BLOCK)
        left_dots = store_hidden_gradient(
            left, gates, pre_ptr, d_pre_ptr, gated_ptr, column_sums_ptr, seed_ptr, drop, stream, draws, place, count,
            held, start, ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,
        )  # fmt: skip
        right_dots = store_hidden_gradient(
            right, gates, pre_ptr, d_pre_ptr, gated_ptr, column_sums_ptr, seed_ptr, drop, stream, draws, place, count,
            held, start + BLOCK // 2, ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,
        )  # fmt: skip
        return left_dots + right_dots
    rows = tl.arange(0, BLOCK_ROWS)
    cols = start + tl.arange(0, BLOCK)
    first = place * WIDTH
    offsets = rows[:, None] * WIDTH + cols[None, :]
    mask = tile_mask(held, cols, WIDTH, TILE)
    pre = tl.load(pre_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
    # A weight that is not finite must not reach the gradients through rows that hold nothing.
    d_hidden = tl.where(mask, d_hidden, 0.0)
    hidden, slope = _activate_with_slope(pre, ACTIVATION)
    if seed_ptr is not None:
        scale = _dropout_scale(seed_ptr, drop, stream, draws, cols, WIDTH)
        hidden *= scale
        slope *= scale
    row_dots = tl.sum(d_hidden * hidden, 1)
    d_pre = d_hidden * slope
    if gates is not None:
        hidden *= gates[:, None]
        d_pre *= gates[:, None]
    inside = tile_mask(rows < count, cols, WIDTH, TILE)
    tl.store(gated_ptr + first + offsets, hidden.to(gated_ptr.dtype.element_ty), mask=inside)
    tl.store(d_pre_ptr + first + offsets, d_pre.to(d_pre_ptr.dtype.element_ty), mask=inside)
    if column_sums_ptr is not None:
        tl.store(column_sums_ptr + cols, tl.sum(d_pre, 0), mask=cols < WIDTH)
    return row_dots
