"""Triton GEMMs of the experts' backward: the gradient of the hidden activations, and the weight gradients.

The hidden activations are recomputed from the pre-activation in the epilogue that needs them, so nothing else is saved,
and the gate's gradient falls out of it: <d_y W2, hidden> + <d_y, b2>.

Dims: E experts, R rows per expert, T tokens, K choices per token, O and H output and hidden columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.impl import ROW_TILE
from vmoe_kernels.common.launch import ANY, Config, register_table
from vmoe_kernels.experts.triton_activation import (
    activation_backward_after_gemm,
    hidden_gradient_outputs,
)
from vmoe_kernels.experts.triton_buffer import Rows
from vmoe_kernels.experts.triton_epilogue import store_hidden_gradient, tile_owner, tile_rows
from vmoe_kernels.experts.triton_gemm import (
    CUBLAS,
    dot_precision,
    gemm_config,
    gemm_tile,
    product,
    programs,
    tile_of,
    weight_operand,
)
from vmoe_kernels.experts.types import Activation


@triton.jit
def _hidden_gradient_tile(
    d_out_ptr,
    gates_ptr,
    weight,
    pre_ptr,
    d_pre_ptr,
    gated_ptr,
    row_dots_ptr,
    column_sums_ptr,
    seed_ptr,
    drop,
    owner,
    stream,
    draws,
    place,
    count,
    choices,
    start,
    end,
    num_parts,
    num_rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of `_hidden_gradient_kernel`, whose arguments these are, column_sums_ptr moved to the tile."""
    held = choices >= 0
    rows = tl.arange(0, BLOCK_ROWS)
    if GATHER:
        d_out_tile_ptr, sources = d_out_ptr, (choices // K).to(tl.int64)
    else:
        d_out_tile_ptr, sources = d_out_ptr + place * IN, rows
    acc = product(
        d_out_tile_ptr, sources, held, weight, owner, start, end,
        IN, OUT, True, TMA, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_IN,
    )  # fmt: skip
    gates = None
    if gates_ptr is not None:
        gates = tl.load(gates_ptr + choices, mask=held, other=0.0).to(tl.float32)
    row_dots = store_hidden_gradient(
        acc, tl.zeros((BLOCK_ROWS,), tl.float32), gates, pre_ptr, d_pre_ptr, gated_ptr, column_sums_ptr, seed_ptr, drop,
        stream, draws, place, count, held, start, ACTIVATION, OUT, BLOCK_ROWS, BLOCK_COLS, PARTS, BLOCK_COLS,
    )  # fmt: skip
    if row_dots_ptr is not None:
        # A pointer that is made before it is needed would take registers from the epilogue.
        plane = (start // BLOCK_COLS).to(tl.int64) * num_parts * num_rows
        tl.store(row_dots_ptr + plane + place + rows, row_dots, mask=rows < count)


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def _hidden_gradient_kernel(
    d_out_ptr,  # (T, O) if GATHER, else (E * R, O)
    choices_ptr,  # (E * R,) int32, or None
    owners_ptr,  # (R / TILE,) int32 expert of each tile of one part, or None where part and expert are one
    gates_ptr,  # (T * K,) floating, or None
    weight,  # (E, O, H): a pointer, or a descriptor if TMA
    pre_ptr,  # (E * R, H)
    d_pre_ptr,  # (E * R, H)
    gated_ptr,  # (E * R, H)
    row_dots_ptr,  # (column tiles, E * R) float32, or None
    column_sums_ptr,  # (E, row tiles, H) float32, or None
    seed_ptr,  # () int64, or None
    drop,
    num_parts,
    num_rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TMA: tl.constexpr,
):
    """A program owns whole tiles of d_pre and gated, and the partial sums of their rows and columns.

    A tile without a filled row is zeros, but in a dropless buffer nobody reads it.
    """
    col_tiles: tl.constexpr = (OUT + BLOCK_COLS - 1) // BLOCK_COLS
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    num_tiles = num_parts * row_tiles * col_tiles
    first = tl.program_id(0)
    step = num_tiles
    if PERSISTENT:
        step = tl.num_programs(0)
    for tile in tl.range(first, num_tiles, step, flatten=PERSISTENT):
        expert, tile_row, tile_col = tile_of(tile, row_tiles, col_tiles, GROUP_ROWS)
        expert = expert.to(tl.int64)
        place, count, choices = tile_rows(choices_ptr, expert, tile_row, num_rows, BLOCK_ROWS)
        owner, stream, draws = tile_owner(owners_ptr, expert, place, num_rows, choices, BLOCK_ROWS, TILE)
        sums_ptr = None
        if column_sums_ptr is not None:
            sums_ptr = column_sums_ptr + (expert * row_tiles + tile_row) * OUT
        start = tile_col * BLOCK_COLS
        # Unrolled float32 products leave no register for the guard around them.
        if owners_ptr is None or PERSISTENT or PRECISION == "ieee":
            end = IN
            # A length that depends on a load would keep a persistent loop from being one with that of the product.
            if choices_ptr is not None and not PERSISTENT:
                end = IN * (tl.max(choices, 0) >= 0).to(tl.int32)
            _hidden_gradient_tile(
                d_out_ptr, gates_ptr, weight, pre_ptr, d_pre_ptr, gated_ptr, row_dots_ptr, sums_ptr, seed_ptr, drop,
                owner, stream, draws, place, count, choices, start, end, num_parts, num_rows,
                IN, OUT, K, GATHER, ACTIVATION, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_IN, PARTS, TMA,
            )  # fmt: skip
        elif tl.max(choices, 0) >= 0:
            _hidden_gradient_tile(
                d_out_ptr, gates_ptr, weight, pre_ptr, d_pre_ptr, gated_ptr, row_dots_ptr, sums_ptr, seed_ptr, drop,
                owner, stream, draws, place, count, choices, start, IN, num_parts, num_rows,
                IN, OUT, K, GATHER, ACTIVATION, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_IN, PARTS, TMA,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_experts", "num_rows"])
def _weight_gradient_kernel(
    a_ptr,  # (T, M) if GATHER_A, else (E * R, M)
    b_ptr,  # (T, N) if GATHER_B, else (E * R, N)
    choices_ptr,  # (E * R,) int32, or None
    spans_ptr,  # (2, E) int32 first row of each expert, and past its last, or None where each has R
    out_ptr,  # (E, M, N)
    num_experts,
    num_rows,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_M: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A program owns a (BLOCK_M, BLOCK_N) tile of one expert's a^T @ b, summed over its rows in float32, in order.

    Rows are loaded AHEAD steps before their product, and the map of gathered ones as many steps before them.
    """
    stages: tl.constexpr = 1 + (2 * AHEAD if GATHER_A or GATHER_B else AHEAD)
    row_tiles: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    col_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, tile_m, tile_n = tile_of(tl.program_id(0), row_tiles, col_tiles, GROUP_M)
    expert = expert.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, count = expert * num_rows, num_rows
    if spans_ptr is not None:
        first = tl.load(spans_ptr + expert).to(tl.int64)
        count = (tl.load(spans_ptr + num_experts + expert) - first).to(tl.int32)
    for start in tl.range(0, count, BLOCK_ROWS, num_stages=stages):
        rows = start + tl.arange(0, BLOCK_ROWS)
        places = first + rows
        inside = rows < count
        a_rows, b_rows, a_held, b_held = places, places, inside, inside
        if GATHER_A or GATHER_B:
            choices = tl.load(choices_ptr + places, mask=inside, other=-1)
            tokens = (choices // K).to(tl.int64)
            if GATHER_A:
                a_rows, a_held = tokens, choices >= 0
            if GATHER_B:
                b_rows, b_held = tokens, choices >= 0
        # a^T as it is loaded: chips without wgmma would bring a transposed tile through registers.
        a = tl.load(a_ptr + a_rows[None, :] * M + m[:, None], mask=a_held[None, :] & (m < M)[:, None], other=0.0)
        b = tl.load(b_ptr + b_rows[:, None] * N + n[None, :], mask=b_held[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    offsets = expert * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _weight_tile(m: int, n: int, rows: int, *, warps: int, ahead: int) -> Config:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_ROWS": rows, "GROUP_M": 8, "AHEAD": ahead}
    return Config(sizes, num_warps=warps, num_stages=1 + ahead)


# Predicted, nothing was measured yet. The epilogue holds the product, the pre-activation and two results at once, in
# quarters of 128x128, which do not spill. In eighths two programs fit on a multiprocessor of sm_90, one's epilogue
# beside the other's product, but for exact GELU, whose series takes three registers too many. With Triton 3.6 they do
# in quarters, which are fewer instructions, and eighths of bare experts would spill.
_D_HIDDEN = gemm_tile(128, 128, 64, warps=8, stages=3, parts=4)
_D_HIDDEN_SM90 = gemm_tile(128, 128, 64, warps=8, stages=3, parts=8, registers=128)
_D_HIDDEN_SM90_TRITON_36 = gemm_tile(128, 128, 64, warps=8, stages=3, parts=4, registers=128)
_D_HIDDEN_FLOAT32 = gemm_tile(64, 64, 32, warps=8, stages=2)
_D_HIDDEN_TF32 = gemm_tile(128, 64, 32, warps=4, stages=3, parts=4)
_D_HIDDEN_CANDIDATES = (
    gemm_tile(128, 64, 64, warps=8, stages=3, parts=2, registers=128),
    gemm_tile(128, 128, 64, warps=8, stages=4, parts=8, persistent=True, tma=True),
)
_D_HIDDEN_TMA = gemm_tile(128, 128, 64, warps=8, stages=3, parts=4, tma=True)
register_table(
    "expert_d_hidden",
    {
        (ANY, ANY, ANY): _D_HIDDEN,
        ("sm90", ANY, "short"): _D_HIDDEN_SM90,
        ("sm90", "3.6", "short"): _D_HIDDEN_SM90_TRITON_36,
    },
    candidates=(*_D_HIDDEN_CANDIDATES, _D_HIDDEN_TMA, CUBLAS),
)
register_table("expert_d_hidden/fp32", {(ANY, ANY, ANY): _D_HIDDEN_FLOAT32}, candidates=(CUBLAS,))
register_table("expert_d_hidden/tf32", {(ANY, ANY, ANY): _D_HIDDEN_TF32}, candidates=(CUBLAS,))
# Predicted, nothing was measured yet; two programs fit on a multiprocessor. wgmma and tcgen05 read both operands from
# shared memory, three buffers of each (loads run two steps ahead). mma.sync holds them in registers too, and the
# accumulator of 4 warps leaves room for 32 rows; three buffers fit in half of 100 KB, four in half of sm_80's 164.
_WEIGHT = _weight_tile(128, 128, 32, warps=4, ahead=3)
_WEIGHT_SM80 = _weight_tile(128, 128, 32, warps=4, ahead=4)
_WEIGHT_SM90 = _weight_tile(128, 128, 64, warps=8, ahead=2)
_WEIGHT_FLOAT32 = _weight_tile(64, 64, 32, warps=8, ahead=1)
_WEIGHT_TF32 = _weight_tile(128, 64, 32, warps=4, ahead=2)
_WEIGHT_CANDIDATES = (
    _weight_tile(128, 128, 64, warps=8, ahead=3),
    _weight_tile(128, 256, 64, warps=8, ahead=2),
)
WEIGHT_OPS = ("expert_d_fc1", "expert_d_fc2")
for _op in WEIGHT_OPS:
    register_table(
        _op,
        {
            (ANY, ANY, ANY): _WEIGHT,
            ("sm80", ANY, ANY): _WEIGHT_SM80,
            ("sm90", ANY, ANY): _WEIGHT_SM90,
            ("sm100", ANY, ANY): _WEIGHT_SM90,
        },
        candidates=(*_WEIGHT_CANDIDATES, CUBLAS),
    )
    register_table(f"{_op}/fp32", {(ANY, ANY, ANY): _WEIGHT_FLOAT32}, candidates=(CUBLAS,))
    register_table(f"{_op}/tf32", {(ANY, ANY, ANY): _WEIGHT_TF32}, candidates=(CUBLAS,))


def hidden_gradient(
    d_out: Rows,
    weight: Tensor,
    pre: Tensor,
    gates: Tensor | None,
    *,
    biased: bool,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Backward through the second GEMM and the activation, which is recomputed.

    Args:
        d_out: rows of O columns: the gradient of the experts' outputs, or, with gates, of the gated sum.
        weight: (E, O, H) of the second GEMM.
        pre: (E, R, H) saved pre-activation.
        gates: (T, K) weights of the choices, or None.
        biased: whether the first bias needs its gradient.
        activation: and dropout.

    Returns:
        d_pre (E, R, H), gated (E, R, H), which is gate * hidden, both 0 in empty rows; row_dots (parts, E * R) float32,
        which add up to <d_out W2, hidden>, or None without gates; column_sums (E, parts, H) float32, which add up to
        the gradient of the first bias, or None. Of a buffer with spans E is 1, and tiles without a filled row are
        undefined.
    """
    buffer = d_out.buffer
    # Activations whose derivative takes few registers.
    bucket = None if activation.name == "gelu" else "short"
    config = gemm_config("expert_d_hidden", weight.dtype, buffer, weight.device, bucket=bucket)
    if config == CUBLAS:
        d_hidden = torch.bmm(d_out.gathered, weight)
        return activation_backward_after_gemm(d_hidden, pre, gates, buffer.choices, biased, activation)
    outputs = hidden_gradient_outputs(pre, config, gates is not None, biased)
    parts, rows, width = pre.shape
    sizes = config.constexprs
    tiles = parts * triton.cdiv(rows, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_COLS"])
    if tiles > 0:
        operand, launch = weight_operand(weight, config, transposed=True)
        _hidden_gradient_kernel[(programs(config, tiles, weight.device),)](
            d_out.data, buffer.choices, buffer.owners, gates, operand, pre, *outputs, activation.seed, activation.drop,
            parts, rows, IN=weight.shape[1], OUT=width, K=buffer.num_choices, TILE=ROW_TILE, GATHER=d_out.gather,
            ACTIVATION=activation.name, PRECISION=dot_precision(weight), **launch,
        )  # fmt: skip
    return outputs


def weight_gradient(op: str, a: Rows, b: Rows) -> Tensor:
    """a^T @ b summed over the rows of each expert, in float32.

    Args:
        op: name of the launch table.
        a: rows of M columns.
        b: rows of N columns; of a and b, at least the one that is not gathered is 0 in empty rows.

    Returns:
        (E, M, N), 0 for an expert without rows.
    """
    buffer = a.buffer
    config = gemm_config(op, a.data.dtype, buffer, a.data.device)
    if config == CUBLAS:
        return torch.bmm(a.gathered.transpose(1, 2), b.gathered)
    m, n = a.data.shape[-1], b.data.shape[-1]
    out = a.data.new_empty(buffer.num_experts, m, n)
    sizes = config.constexprs
    tiles = buffer.num_experts * triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"])
    if tiles > 0:
        _weight_gradient_kernel[(tiles,)](
            a.data, b.data, buffer.choices, buffer.spans, out, buffer.num_experts, buffer.rows,
            M=m, N=n, K=buffer.num_choices, GATHER_A=a.gather, GATHER_B=b.gather,
            PRECISION=dot_precision(a.data), **config.kwargs(),
        )  # fmt: skip
    return out
