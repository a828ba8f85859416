"""Philox-4x32-10 random numbers in plain PyTorch: those of Triton's `tl.randint4x(seed, block)`, on any device.

Counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") need no state: a
backward pass, a recomputation and another device all draw the same values for the same seed and block.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_ROUNDS = 10


def philox_normal(seed: Tensor, rows: int, columns: int, *, by_column: bool = False) -> Tensor:
    """Standard normal samples by Box and Muller's method: a block of four words makes four columns of a row.

    Columns 4 b + i of row r are of block r * ceil(columns / 4) + b, whose words 0 and 1 give radii and 2 and 3 angles:
    the cosine for i = 0 and 1, the sine for i = 2 and 3.

    Args:
        seed: 0-dim int64 key.
        rows: number of rows.
        columns: samples of a row; rows * ceil(columns / 4) must be at most 2^32.
        by_column: if a column is to lie in one piece in memory.

    Returns:
        (rows, columns) float32 on the device of `seed`.
    """
    across = torch.arange(-(-columns // 4), device=seed.device)
    down = torch.arange(rows, device=seed.device) * len(across)
    words = philox_words(seed, across.unsqueeze(1) + down if by_column else down.unsqueeze(1) + across)
    dim = 1 if by_column else 2
    # All words at once: what takes the time on a CPU is the number of operators.
    radius, angle = uniform(torch.stack(words, dim)).chunk(2, dim)
    radius = radius.clamp(min=1.0e-7).log_().mul_(-2.0).sqrt_()
    angle = angle * (2.0 * math.pi)
    normals = torch.cat((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim)
    if by_column:
        return normals.flatten(0, 1)[:columns].t()
    return normals.flatten(1)[:, :columns].contiguous()


def philox_words(seed: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each block: the low halves of int64, the high ones are any.

    Args:
        seed: 0-dim int64 key.
        blocks: (...) int64 numbers in 0..2^32-1.

    Returns:
        Four of (...) int64.
    """
    # 0-dim tensors: an operator takes half as long again with a number of Python's.
    factor_a, factor_b, mask, half = torch.tensor([_ROUND_A, _ROUND_B, _MASK, 32], device="cpu").unbind()
    steps = torch.arange(_ROUNDS, device=seed.device)
    c0 = blocks
    # Words that are the same for all blocks, here and in the next rounds, are scalars.
    c1 = c2 = c3 = torch.zeros((), device=seed.device, dtype=torch.int64)
    for k0, k1 in zip((seed + steps * _KEY_A).unbind(), ((seed >> 32) + steps * _KEY_B).unbind()):
        # int64 products wrap modulo 2^64, which keeps all 64 bits that the 32x32 product has. Only factors need to be
        # free of what is above their 32 bits: c1 and c3 are added bit by bit.
        a, b = c0 * factor_a, c2 * factor_b
        c0, c2 = _mixed(b >> half, c1, k0).bitwise_and_(mask), _mixed(a >> half, c3, k1).bitwise_and_(mask)
        c1, c3 = b, a
    return c0, c1, c2, c3


def _mixed(high: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The high half of a product, a word and a key added bit by bit."""
    high.bitwise_xor_(key)
    # In place where it can hold all blocks.
    return high.bitwise_xor_(word) if high.ndim >= word.ndim else high ^ word


def uniform(bits: Tensor) -> Tensor:
    """The low 32 bits of int64 to float32 in [0, 1)."""
    word = bits.to(torch.int32)
    # A negative number is complemented.
    return (word ^ (word >> 31)).to(torch.float32) * 4.6566127342e-10


def dropout_keep(seed: Tensor, stream: int, shape: tuple[int, int], drop: float) -> Tensor:
    """Which elements dropout keeps; the same for the same (seed, stream, shape, drop) on one kind of device.

    Args:
        seed: 0-dim int64 key.
        stream: an independent stream per expert.
        shape: (rows, columns).
        drop: probability of dropping an element.

    Returns:
        (rows, columns) bool on the device of `seed`.
    """
    if seed.device.type == "cpu":
        return torch.ops.vmoe.dropout_keep(seed, stream, *shape, drop)
    return philox_keep(seed + stream, shape, drop)


def philox_keep(seed: Tensor, shape: tuple[int, int], drop: float) -> Tensor:
    """Which elements `dropout_keep` keeps on CUDA: element i is that of block i."""
    blocks = torch.arange(math.prod(shape), device=seed.device).view(shape)
    return uniform(philox_words(seed, blocks)[0]) >= drop


@torch.library.custom_op("vmoe::dropout_keep", mutates_args=(), device_types="cpu")
def _dropout_keep_op(seed: Tensor, stream: int, rows: int, columns: int, drop: float) -> Tensor:
    # PyTorch's generator: ten times faster there than Philox in int64 arithmetic. An op of its own, which neither a
    # compiler nor vmap looks into.
    generator = torch.Generator().manual_seed(int(seed) + stream)
    return torch.empty((rows, columns), dtype=torch.bool).bernoulli_(1.0 - drop, generator=generator)


@_dropout_keep_op.register_fake
def _(seed, stream, rows, columns, drop):
    return seed.new_empty((rows, columns), dtype=torch.bool)
