"""Small kernels with known properties for the tests of the compile report, and their recorded launches."""

import dataclasses

import torch
import triton
import triton.language as tl

from benchmarks.compile.launches import Launch, record


@triton.jit
def product(a, b, c, K, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    # a (BLOCK, K), b (K, BLOCK), c (BLOCK, BLOCK)
    """One program owns all of c."""
    row, inner = tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, 32):
        x = tl.load(a + row[:, None] * K + (start + inner)[None, :])
        y = tl.load(b + (start + inner)[:, None] * BLOCK + row[None, :])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + row[:, None] * BLOCK + row[None, :], total.to(c.dtype.element_ty))


@triton.jit
def running_sums(x, y, SIZE: tl.constexpr):
    # x, y (SIZE,)
    """One program owns all of y; its SIZE values live in registers at once."""
    offsets = tl.arange(0, SIZE)
    values = tl.load(x + offsets)
    tl.store(y + offsets, tl.cumsum(values, 0) * tl.max(values, 0))


def product_case(
    name: str, dtype: torch.dtype, precision: str = "tf32", block: int = 64, inner: int = 64, **changes
) -> Launch:
    a, b, c = (torch.empty(block, inner, dtype=dtype) for _ in range(3))
    with record(90) as launches:
        product[1, 2](a, b, c, inner, BLOCK=block, PRECISION=precision, num_stages=2)
    return dataclasses.replace(*launches, name=name, **changes)


def sums_case(name: str, size: int, num_warps: int) -> Launch:
    x, y = torch.empty(2, size)
    with record(90) as launches:
        running_sums[(1,)](x, y, SIZE=size, num_warps=num_warps)
    return dataclasses.replace(*launches, name=name)
