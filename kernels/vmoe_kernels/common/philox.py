"""Philox-4x32-10 noise in plain PyTorch: the same numbers as Triton's `tl.randn(seed, offset)`, on any device.

Counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") need no state: a
backward pass, a recomputation and another device all draw the same value for the same (seed, offset).
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_ROUNDS = 10


def philox_normal(seed: Tensor, count: int) -> Tensor:
    """Standard normal samples for the offsets 0..count-1.

    Args:
        seed: 0-dim int64 key.
        count: number of samples, below 2^32.

    Returns:
        (count,) float32 on the device of `seed`.
    """
    c0, c1 = philox_bits(seed, count)
    radius = uniform(c0).clamp_(min=1.0e-7).log_().mul_(-2.0).sqrt_()
    return radius.mul_(uniform(c1).mul_(2.0 * math.pi).cos_())


def philox_bits(seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first two 32-bit words of the Philox blocks 0..count-1: the low halves of int64, the high ones are any."""
    steps = torch.arange(_ROUNDS, device=seed.device, dtype=torch.int64)
    *keys, (last, _) = zip((seed + steps * _KEY_A).unbind(), ((seed >> 32) + steps * _KEY_B).unbind())
    c0 = torch.arange(count, device=seed.device, dtype=torch.int64)
    # Words that are the same for all blocks, here and in the next rounds, are scalars.
    c1 = c2 = c3 = torch.zeros((), device=seed.device, dtype=torch.int64)
    for k0, k1 in keys:
        # int64 products wrap modulo 2^64, which keeps all 64 bits that the 32x32 product has. Only factors need to be
        # free of what is above their 32 bits: c1 and c3 are added bit by bit.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = _mixed(b, c1, k0).bitwise_and_(_MASK), _mixed(a, c3, k1).bitwise_and_(_MASK)
        c1, c3 = b, a
    # Of the last round two words are wanted.
    b = c2 * _ROUND_B
    return _mixed(b, c1, last), b


def _mixed(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The high half of a product, a word and a key added bit by bit."""
    high = (product >> 32).bitwise_xor_(key)
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
    rows, columns = shape
    if seed.device.type == "cpu":
        return torch.ops.vmoe.dropout_keep(seed, stream, rows, columns, drop)
    bits, _ = philox_bits(seed + stream, rows * columns)
    return (uniform(bits) >= drop).view(rows, columns)


@torch.library.custom_op("vmoe::dropout_keep", mutates_args=(), device_types="cpu")
def _dropout_keep_op(seed: Tensor, stream: int, rows: int, columns: int, drop: float) -> Tensor:
    # PyTorch's generator: ten times faster there than Philox in int64 arithmetic. An op of its own, which neither a
    # compiler nor vmap looks into.
    generator = torch.Generator().manual_seed(int(seed) + stream)
    return torch.empty((rows, columns), dtype=torch.bool).bernoulli_(1.0 - drop, generator=generator)


@_dropout_keep_op.register_fake
def _(seed, stream, rows, columns, drop):
    return seed.new_empty((rows, columns), dtype=torch.bool)
