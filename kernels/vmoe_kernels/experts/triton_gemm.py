"""Triton GEMMs over the rows of every expert, with the work around them in the epilogue, or cuBLAS where it is chosen.

Rows come from the experts' buffers as they lie, or straight from the tokens that hold them; rows that no choice holds
are neither read nor written. A tile of such rows costs a load of its map, or, of a persistent program, its products:
such programs are for buffers that have few of them. Experts have R rows each, or in a dropless buffer as many as they
need, and a map from tiles to experts. Weights come by pointers or, if a config says so, by descriptors (TMA on chips
that have it), which take no registers for addresses.

Dims: E experts, R rows per expert, N rows in all, T tokens, K choices per token, IN and OUT columns of a GEMM.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.impl import ROW_TILE
from vmoe_kernels.common.launch import ANY, Config, candidates, device_kind, look_up, register_table, size_bucket
from vmoe_kernels.experts.triton_activation import activation_after_gemm
from vmoe_kernels.experts.triton_buffer import Buffer, Rows
from vmoe_kernels.experts.triton_epilogue import store_hidden, tile_mask, tile_owner, tile_rows
from vmoe_kernels.experts.triton_operand import tma_reads, weight_operand
from vmoe_kernels.experts.types import NO_ACTIVATION, Activation


@triton.jit
def tile_of(tile, row_tiles, COL_TILES: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """Expert, row tile and column tile of a tile: GROUP_ROWS row tiles share the columns' weights while in L2."""
    expert = tile // (row_tiles * COL_TILES)
    tile %= row_tiles * COL_TILES
    first = tile // (GROUP_ROWS * COL_TILES) * GROUP_ROWS
    size = tl.minimum(row_tiles - first, GROUP_ROWS)
    tile %= GROUP_ROWS * COL_TILES
    return expert, first + tile % size, tile // size


@triton.jit
def product(
    x_ptr,  # (any, IN)
    sources,  # (BLOCK_ROWS,) rows of x
    held,  # (BLOCK_ROWS,) bool
    weight,  # (E, OUT, IN), or (E, IN, OUT) if TRANSPOSED: a pointer, or a descriptor if TMA
    expert,
    first_col,
    end,  # IN, or 0 to skip the tile
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """A (BLOCK_ROWS, BLOCK_COLS) tile of x @ weight^T (x @ weight if TRANSPOSED) in float32."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    cols = first_col + tl.arange(0, BLOCK_COLS)
    for start in range(0, end, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        x_mask = tile_mask(held, inner, IN, BLOCK_IN)
        x = tl.load(x_ptr + sources[:, None] * IN + inner[None, :], mask=x_mask, other=0.0)
        if TMA:
            # A descriptor ends with the expert's own matrix and gives 0 past it.
            if TRANSPOSED:
                w = weight.load([expert.to(tl.int32), start, first_col]).reshape(BLOCK_IN, BLOCK_COLS)
            else:
                w = weight.load([expert.to(tl.int32), first_col, start]).reshape(BLOCK_COLS, BLOCK_IN).trans(1, 0)
        else:
            if TRANSPOSED:
                offsets = inner[:, None] * OUT + cols[None, :]
            else:
                offsets = inner[:, None] + cols[None, :] * IN
            weight_ptr = weight + expert * (IN * OUT)
            if IN % BLOCK_IN == 0 and OUT % BLOCK_COLS == 0:
                w = tl.load(weight_ptr + offsets)
            else:
                w = tl.load(weight_ptr + offsets, mask=(inner < IN)[:, None] & (cols < OUT)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _linear_tile(
    x_ptr,
    weight,
    bias_ptr,
    pre_ptr,
    out_ptr,
    seed_ptr,
    drop,
    owner,
    stream,
    draws,
    place,
    choices,
    start,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of `_linear_kernel`, whose arguments these are, beside what it found out about the tile."""
    held = choices >= 0
    if GATHER:
        x_tile_ptr, sources = x_ptr, (choices // K).to(tl.int64)
    else:
        x_tile_ptr, sources = x_ptr + place * IN, tl.arange(0, BLOCK_ROWS)
    acc = product(
        x_tile_ptr, sources, held, weight, owner, start, IN,
        IN, OUT, TRANSPOSED, TMA, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_IN,
    )  # fmt: skip
    store_hidden(
        acc, bias_ptr, pre_ptr, out_ptr, seed_ptr, drop, owner, stream, draws, place, held,
        start, ACTIVATION, OUT, BLOCK_ROWS, BLOCK_COLS, PARTS, BLOCK_COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def _linear_kernel(
    x_ptr,  # (T, IN) if GATHER, else (E * R, IN)
    choices_ptr,  # (E * R,) int32, or None
    owners_ptr,  # (R / TILE,) int32 expert of each tile of one part, or None where part and expert are one
    end_ptr,  # () int32 row past those that experts have, or None where that is num_rows
    weight,  # (E, OUT, IN), or (E, IN, OUT) if TRANSPOSED: a pointer, or a descriptor if TMA
    bias_ptr,  # (E, OUT), or None
    pre_ptr,  # (E * R, OUT), or None
    out_ptr,  # (E * R, OUT)
    seed_ptr,  # () int64, or None
    drop,
    num_parts,
    num_rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
    """A program owns whole (BLOCK_ROWS, BLOCK_COLS) tiles of out, one, or every so many if PERSISTENT."""
    col_tiles: tl.constexpr = (OUT + BLOCK_COLS - 1) // BLOCK_COLS
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    if end_ptr is not None:
        row_tiles = tl.cdiv(tl.load(end_ptr), BLOCK_ROWS)
    num_tiles = num_parts * row_tiles * col_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=PERSISTENT):
        expert, tile_row, tile_col = tile_of(tile, row_tiles, col_tiles, GROUP_ROWS)
        expert = expert.to(tl.int64)
        place, _, choices = tile_rows(choices_ptr, expert, tile_row, num_rows, BLOCK_ROWS)
        owner, stream, draws = tile_owner(owners_ptr, expert, place, num_rows, choices, BLOCK_ROWS, TILE)
        start = tile_col * BLOCK_COLS
        # A branch, or a product as long as a load says, would keep a persistent loop from being one with that of the
        # product: it multiplies tiles without a filled row too.
        if choices_ptr is None or PERSISTENT or tl.max(choices, 0) >= 0:
            _linear_tile(
                x_ptr, weight, bias_ptr, pre_ptr, out_ptr, seed_ptr, drop, owner, stream, draws, place, choices,
                start, IN, OUT, K, GATHER, TRANSPOSED, ACTIVATION, PRECISION,
                BLOCK_ROWS, BLOCK_COLS, BLOCK_IN, PARTS, TMA,
            )  # fmt: skip


# Stands in a launch table for the library's batched GEMM, with the epilogue as a kernel of its own.
CUBLAS = Config({"GEMM": "cublas"}, num_warps=4)
ROW_BOUNDS = (64,)


def gemm_tile(
    rows: int,
    cols: int,
    inner: int,
    *,
    warps: int,
    stages: int,
    group: int = 8,
    parts: int = 1,
    persistent: bool = False,
    tma: bool = False,
    registers: int | None = None,
) -> Config:
    return Config(
        {
            "BLOCK_ROWS": rows,
            "BLOCK_COLS": cols,
            "BLOCK_IN": inner,
            "GROUP_ROWS": group,
            "PARTS": parts,
            "PERSISTENT": persistent,
            "TMA": tma,
        },
        num_warps=warps,
        num_stages=stages,
        max_registers=registers,
    )


# Predicted, nothing was measured yet; benchmarks/results/pipelines has what they compile to. Chips with mma.sync take
# 128x128 with 4 warps, three buffers in half of 100 KB or four in half of sm_80's 164, so that two programs share a
# multiprocessor and one's epilogue (4 bytes of stores per 1,536 FLOPs at D=768) hides behind the other's products. With
# wgmma 8 warps in 128 registers do the same; with that cap sm_100 would spill, and so would dropout, which draws random
# numbers in the epilogue. float32 in full precision has no tensor cores: small tiles fill the chip.
_MMA = gemm_tile(128, 128, 32, warps=4, stages=4, parts=8)
_MMA_SM80 = gemm_tile(128, 128, 32, warps=4, stages=5, parts=4)
_SQUARE_SM90 = gemm_tile(128, 128, 64, warps=8, stages=3, parts=2, registers=128)
_SQUARE_SM100 = gemm_tile(128, 128, 64, warps=8, stages=3, parts=4)
_FEW_ROWS = gemm_tile(64, 128, 64, warps=4, stages=3, parts=2)
_FEW_ROWS_SM100 = gemm_tile(64, 128, 64, warps=4, stages=3, parts=4)
_DROPOUT = gemm_tile(128, 128, 64, warps=8, stages=3, parts=8)
_FLOAT32 = gemm_tile(64, 64, 32, warps=8, stages=2)
_TF32 = gemm_tile(128, 64, 32, warps=4, stages=3, parts=4)
# 128x128 tiles read 32 KB of L2 per 2.1 MFLOP: at 6 TB/s more than twice the time of the products on an H100. Twice as
# wide they read 3/4 of that, and a program that goes on to its next tile has its loads under way in the epilogue.
WIDE_TILE = (128, 256, 64)
_WIDE = gemm_tile(*WIDE_TILE, warps=8, stages=4, parts=8, persistent=True, tma=True)
# By TMA the square tile fits two programs on a multiprocessor without a cap.
_TMA = (gemm_tile(128, 128, 64, warps=8, stages=3, parts=4, tma=True), _WIDE)
_BY_POINTERS = (
    gemm_tile(128, 256, 64, warps=8, stages=3, parts=2),
    gemm_tile(256, 128, 64, warps=8, stages=3, parts=2),
    gemm_tile(128, 256, 64, warps=8, stages=3, parts=4, persistent=True),
    gemm_tile(128, 128, 64, warps=8, stages=4, persistent=True),
)
_CANDIDATES = (*_BY_POINTERS, *_TMA, CUBLAS)


LINEAR_OPS = ("expert_up", "expert_down", "expert_d_rows")
for _op in LINEAR_OPS:
    register_table(
        _op,
        {
            (ANY, ANY, ANY): _MMA,
            ("sm80", ANY, ANY): _MMA_SM80,
            ("sm90", ANY, ANY): _SQUARE_SM90,
            ("sm100", ANY, ANY): _SQUARE_SM100,
            ("sm90", ANY, "wide"): _WIDE,
            ("sm100", ANY, "wide"): _WIDE,
            **{(kind, ANY, "le64"): _FEW_ROWS for kind in (ANY, "sm80", "sm90")},
            ("sm100", ANY, "le64"): _FEW_ROWS_SM100,
        },
        candidates=_CANDIDATES,
    )
    register_table(f"{_op}/fp32", {(ANY, ANY, ANY): _FLOAT32}, candidates=(CUBLAS,))
    register_table(f"{_op}/tf32", {(ANY, ANY, ANY): _TF32}, candidates=(CUBLAS,))
register_table("expert_up/dropout", {(ANY, ANY, ANY): _DROPOUT}, candidates=(CUBLAS,))


def gemm_config(
    op: str, dtype: torch.dtype, buffer: Buffer, device: torch.device, drop: float = 0.0, bucket: str | None = None
) -> Config:
    """The table entry of a GEMM over a buffer's rows; float32, tf32 and dropout have tables of their own.

    `bucket` stands for that of the rows where they do not decide.
    """
    if dtype == torch.float32:
        op = f"{op}/tf32" if _tf32(device) else f"{op}/fp32"
    elif drop > 0:
        op = f"{op}/dropout"
    config = look_up(op, device, bucket or size_bucket(buffer.rows_of_expert, ROW_BOUNDS))
    if buffer.spans is None:
        return config
    # The library has no product of experts of so many rows each, and no tile may hold rows of two.
    return next(each for each in (config, *candidates(op)) if _keeps_experts_apart(each.constexprs))


def _keeps_experts_apart(sizes: Mapping[str, Any]) -> bool:
    return "BLOCK_M" in sizes or ("BLOCK_ROWS" in sizes and ROW_TILE % sizes["BLOCK_ROWS"] == 0)


def _takes_wide_tiles(buffer: Buffer, weight: Tensor, transposed: bool) -> bool:
    """Whether tiles of WIDE_TILE, which know no masks and are multiplied without a filled row too, have work enough."""
    rows, cols, inner = WIDE_TILE
    width_in, width_out = weight.shape[1:] if transposed else reversed(weight.shape[1:])
    if width_out % cols or width_in % inner or not tma_reads(weight) or not buffer.mostly_filled:
        return False
    tiles = buffer.parts * triton.cdiv(buffer.rows, rows) * (width_out // cols)
    return buffer.rows_of_expert > ROW_BOUNDS[-1] and tiles >= 2 * _multiprocessors(weight.device)


def _tf32(device: torch.device) -> bool:
    """Whether PyTorch was told to multiply float32 as tf32 in its own products on a GPU."""
    return device_kind(device) != ANY and torch.backends.cuda.matmul.fp32_precision == "tf32"


def dot_precision(tensor: Tensor) -> str:
    """How float32 factors are multiplied: in full, or as tf32 where PyTorch was told so for its own products."""
    return "tf32" if _tf32(tensor.device) else "ieee"


@cache
def _multiprocessors(device: torch.device) -> int:
    # Off CUDA (the interpreter) any number does that lets a program own several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def programs(config: Config, tiles: int, device: torch.device) -> int:
    """Size of the grid: a program per tile, or per multiprocessor if the config is persistent."""
    return min(tiles, _multiprocessors(device)) if config.constexprs["PERSISTENT"] else tiles


def linear(
    op: str,
    x: Rows,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool = False,
    activation: Activation = NO_ACTIVATION,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out = dropout(activation(x @ weight^T + bias)) for the rows of every expert; empty rows are left undefined.

    Args:
        op: name of the launch table.
        x: rows of IN columns.
        weight: (E, OUT, IN), or (E, IN, OUT) if transposed, contiguous.
        bias: (E, OUT) or None.
        transposed: how the weight lies.
        activation: and dropout.
        save: whether the pre-activation is wanted.

    Returns:
        (E, R, OUT), or (1, R, OUT) of a buffer with spans, and the pre-activation likewise or None.
    """
    buffer = x.buffer
    width_in, width_out = x.data.shape[-1], weight.shape[2 if transposed else 1]
    bucket = "wide" if _takes_wide_tiles(buffer, weight, transposed) else None
    config = gemm_config(op, weight.dtype, buffer, weight.device, activation.drop, bucket)
    if config == CUBLAS:
        raw = torch.bmm(x.gathered, weight if transposed else weight.transpose(1, 2))
        if bias is None and activation.name == "none":
            return raw, None
        return activation_after_gemm(raw, bias, buffer.choices, activation, save), raw if save else None
    out = weight.new_empty(buffer.parts, buffer.rows, width_out)
    pre = torch.empty_like(out) if save else None
    sizes = config.constexprs
    tiles = buffer.parts * triton.cdiv(buffer.rows, sizes["BLOCK_ROWS"]) * triton.cdiv(width_out, sizes["BLOCK_COLS"])
    if tiles > 0:
        operand, launch = weight_operand(weight, config, transposed)
        _linear_kernel[(programs(config, tiles, weight.device),)](
            x.data, buffer.choices, buffer.owners, buffer.end, operand, bias, pre, out,
            activation.seed, activation.drop, buffer.parts, buffer.rows,
            IN=width_in, OUT=width_out, K=buffer.num_choices, TILE=ROW_TILE, GATHER=x.gather, TRANSPOSED=transposed,
            ACTIVATION=activation.name, PRECISION=dot_precision(weight), **launch,
        )  # fmt: skip
    return out, pre
