"""Philox-4x32-10 noise in plain PyTorch or NumPy: the same numbers as Triton's `tl.randn(seed, offset)`, on any device.

Counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") need no state: a
backward pass, a recomputation and another device all draw the same value for the same (seed, offset).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
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
    if seed.device.type == "cpu":
        return torch.ops.vmoe.router_noise(seed, count)
    return _normal(*philox_bits(seed, count))


@torch.library.custom_op(
    "vmoe::router_noise", mutates_args=(), device_types="cpu", schema="(Tensor seed, SymInt count) -> Tensor"
)
def _router_noise_op(seed, count):
    # By NumPy, which takes half the time: its operators start sooner. An op of its own, as nobody looks into it.
    key = int(seed)
    keys = [
        (np.uint64((key + step * _KEY_A) & _MASK), np.uint64(((key >> 32) + step * _KEY_B) & _MASK))
        for step in range(_ROUNDS)
    ]
    # The words that are the same for all blocks are scalars, whose products wrap as those of arrays do.
    with np.errstate(over="ignore"):
        words = _words(np.arange(count, dtype=np.uint64), np.uint64(0), keys, np.uint64)
    return _normal(*(torch.from_numpy(word.astype(np.uint32).view(np.int32)) for word in words))


@_router_noise_op.register_fake
def _(seed, count):
    return seed.new_empty(count, dtype=torch.float32)


def philox_bits(seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first two 32-bit words of the Philox blocks 0..count-1: the low halves of int64, the high ones are any."""
    steps = torch.arange(_ROUNDS, device=seed.device, dtype=torch.int64)
    keys = zip((seed + steps * _KEY_A).unbind(), ((seed >> 32) + steps * _KEY_B).unbind())
    zero = torch.zeros((), device=seed.device, dtype=torch.int64)
    return _words(torch.arange(count, device=seed.device, dtype=torch.int64), zero, keys, int)


def _words(counters: Any, zero: Any, keys: Iterable[tuple[Any, Any]], number: Callable[[int], Any]) -> tuple[Any, Any]:
    """The first two words of each block in the low half of 64 bits; the high one is any.

    Args:
        counters: 64-bit integers of PyTorch or NumPy.
        zero: one of them.
        keys: two words for each round.
        number: makes a constant that goes with the counters.
    """
    factor_a, factor_b, mask, half = (number(each) for each in (_ROUND_A, _ROUND_B, _MASK, 32))
    *keys, (last, _) = keys
    # Words that are the same for all blocks, here and in the next rounds, are scalars.
    c0, c1, c2, c3 = counters, zero, zero, zero
    for k0, k1 in keys:
        # Products wrap modulo 2^64, which keeps all 64 bits that the 32x32 product has. Only factors need to be free of
        # what is above their 32 bits: c1 and c3 are added bit by bit.
        a, b = c0 * factor_a, c2 * factor_b
        c0 = (b >> half) ^ (c1 ^ k0)
        c2 = (a >> half) ^ (c3 ^ k1)
        c0 &= mask
        c2 &= mask
        c1, c3 = b, a
    # Of the last round two words are wanted.
    b = c2 * factor_b
    return (b >> half) ^ (c1 ^ last), b


def _normal(first: Tensor, second: Tensor) -> Tensor:
    """By Box and Muller, of two words each."""
    radius = uniform(first).clamp_(min=1.0e-7).log_().mul_(-2.0).sqrt_()
    return radius.mul_(uniform(second).mul_(2.0 * math.pi).cos_())


def uniform(bits: Tensor) -> Tensor:
    """The low 32 bits of integers to float32 in [0, 1)."""
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
