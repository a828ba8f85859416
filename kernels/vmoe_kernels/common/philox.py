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
    u1 = uniform(c0).clamp(min=1.0e-7)
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2.0 * math.pi * uniform(c1))


def philox_bits(seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first two 32-bit words, held in int64, of the Philox blocks 0..count-1."""
    c0 = torch.arange(count, device=seed.device, dtype=torch.int64)
    c1, c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits that the 32x32 product has.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((b >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((a >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = b & _MASK, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1


def uniform(bits: Tensor) -> Tensor:
    """32 random bits, held in int64, to float32 in [0, 1)."""
    # A value with the top bit set is a negative int32, which is complemented.
    magnitude = torch.where(bits > 0x7FFFFFFF, _MASK - bits, bits)
    return magnitude.to(torch.float32) * 4.6566127342e-10


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
