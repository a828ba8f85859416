"""What happens to a tile between the GEMMs of an expert, for Triton kernels: bias, activation, dropout, and backward.

The same code runs in the epilogue of our GEMMs (`triton_gemm`, `triton_gradient`) and, where cuBLAS was chosen for the
GEMM, in a kernel of its own (`triton_activation`).

Dims: E experts, R rows per expert, W columns.
"""

import math

import triton
import triton.language as tl

_LOG2_E = 1.0 / math.log(2.0)
# tanh GELU is x * sigmoid(x * (_A + _B * x^2)), which needs no tanh.
_A = tl.constexpr(2.0 * (2.0 / math.pi) ** 0.5)
_B = tl.constexpr(2.0 * (2.0 / math.pi) ** 0.5 * 0.044715)
_3B = tl.constexpr(3.0 * _B.value)
# The same for powers of two.
_A_2 = tl.constexpr(-_LOG2_E * _A.value)
_B_2 = tl.constexpr(-_LOG2_E * _B.value)
_MINUS_LOG2_E = tl.constexpr(-_LOG2_E)
_MINUS_HALF_LOG2_E = tl.constexpr(-0.5 * _LOG2_E)
_INV_SQRT_2PI = tl.constexpr((2.0 * math.pi) ** -0.5)
# The normal distribution's tail over exp(-x^2 / 2) is t * (_Q[0] + _Q[1] * t + ...), t = 1 / (1 + _P * x), for x >= 0:
# least squares of the relative error with weights raised where it was large, 1.3e-7 at most.
_P = tl.constexpr(0.3)
_Q = tl.constexpr(
    (
        0.1196251608478777,
        0.12081697207573372,
        0.09952251102053156,
        0.12984543112885663,
        -0.05610006753524868,
        0.20896956498854136,
        -0.15871675023715856,
        0.03603711695715523,
    )
)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1: two instructions, and a division is many."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _rest(s, power):
    """1 - s of s = 1 / (1 + power): next to s = 1 a difference would be of rounding alone, and x makes that large."""
    # An infinite power times 0 is NaN, and a minimum takes the other operand.
    return tl.minimum(s * power, 1.0)


@triton.jit
def _normal_cdf(x):
    """The standard normal distribution, small values as exact as large ones, and exp(-x^2 / 2)."""
    t = _reciprocal(tl.abs(x) * _P + 1.0)
    series = t * _Q[7] + _Q[6]
    for i in tl.static_range(6):
        series = t * series + _Q[5 - i]
    series *= t
    half_power = tl.exp2(x * x * _MINUS_HALF_LOG2_E)
    tail = half_power * series
    return tl.where(x < 0, tail, 1.0 - tail), half_power


@triton.jit
def _activate(x, NAME: tl.constexpr):
    """The activation of a float32 tile; "none" leaves it as it is."""
    if NAME == "gelu_tanh":
        y = x * _reciprocal(1.0 + tl.exp2(x * (x * x * _B_2 + _A_2)))
    elif NAME == "gelu":
        below, _ = _normal_cdf(x)
        y = x * below
    elif NAME == "relu":
        # A NaN is not below 0 and stays.
        y = tl.where(x < 0, 0.0, x)
    elif NAME == "silu":
        y = x * _reciprocal(1.0 + tl.exp2(x * _MINUS_LOG2_E))
    else:
        tl.static_assert(NAME == "none", "unknown activation")
        y = x
    return y


@triton.jit
def _activate_with_slope(x, NAME: tl.constexpr):
    """The activation of a float32 tile, and its derivative."""
    if NAME == "gelu_tanh":
        square = x * x
        power = tl.exp2(x * (square * _B_2 + _A_2))
        s = _reciprocal(1.0 + power)
        y = x * s
        slope = s + s * _rest(s, power) * x * (square * _3B + _A)
    elif NAME == "gelu":
        below, half_power = _normal_cdf(x)
        y = x * below
        slope = below + x * _INV_SQRT_2PI * half_power
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        power = tl.exp2(x * _MINUS_LOG2_E)
        s = _reciprocal(1.0 + power)
        y = x * s
        slope = s * (1.0 + x * _rest(s, power))
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
    row_dots,  # (BLOCK_ROWS,) float32
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

    Empty rows get zeros in both, as the weight gradients read them. Returns row_dots + <d_hidden, hidden> of each row.
    PARTS as in `store_hidden`.
    """
    if PARTS > 1:
        left, right = _halves(d_hidden, BLOCK_ROWS, BLOCK)
        row_dots = store_hidden_gradient(
            left, row_dots, gates, pre_ptr, d_pre_ptr, gated_ptr, column_sums_ptr, seed_ptr, drop, stream, draws,
            place, count, held, start, ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,
        )  # fmt: skip
        return store_hidden_gradient(
            right, row_dots, gates, pre_ptr, d_pre_ptr, gated_ptr, column_sums_ptr, seed_ptr, drop, stream, draws,
            place, count, held, start + BLOCK // 2, ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,
        )  # fmt: skip
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
    row_dots += tl.sum(d_hidden * hidden, 1)
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
