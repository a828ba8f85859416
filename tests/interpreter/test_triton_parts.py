"""A float32 operand in three parts of bfloat16: exact, and a product of parts is a product of float32."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from vmoe_kernels.routing.triton_router import bfloat16_parts, dot_in_parts

EPS = float(np.finfo(np.float32).eps)


@triton.jit
def _parts_kernel(x_ptr, high_ptr, middle_ptr, low_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, middle, low = bfloat16_parts(tl.load(x_ptr + at))
    tl.store(high_ptr + at, high)
    tl.store(middle_ptr + at, middle)
    tl.store(low_ptr + at, low)


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, PARTS_OF_A: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out (M, N) = a (M, 4 * K) @ b (4 * K, N)."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, 4 * K, K):
        k = start + tl.arange(0, K)
        a = tl.load(a_ptr + m[:, None] * 4 * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
        acc = dot_in_parts(a, b, acc, PARTS_OF_A)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


def _parts(x):
    parts = [torch.full_like(x, torch.nan) for _ in range(3)]
    _parts_kernel[(1,)](x, *parts, BLOCK=x.numel())
    return parts


def test_parts_are_of_bfloat16_and_add_up_bit_for_bit():
    make = torch.Generator().manual_seed(0)
    # Every exponent but that of infinity: numbers of all sizes, subnormal ones and zeros among them.
    bits = torch.randint(0, 255 << 23, (4096,), generator=make, dtype=torch.int32)
    bits[:4] = torch.tensor([0, 1, (255 << 23) - 1, 1 << 16], dtype=torch.int32)
    x = bits.view(torch.float32) * torch.where(torch.rand(4096, generator=make) < 0.5, -1.0, 1.0)
    parts = _parts(x)
    # Below 2^-110 bfloat16 has no bits for the last part.
    large = x.abs() >= 2.0**-110
    for part in parts:
        assert torch.equal(part[large], part[large].bfloat16().float())
    assert torch.equal(sum(part.double() for part in parts), x.double())
    assert all(bool((parts[i + 1].abs() <= parts[i].abs())[large].all()) for i in (0, 1))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_parts_of_what_is_not_finite():
    nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    high, middle, low = _parts(torch.tensor([torch.inf, -torch.inf, torch.nan, nan.item()]))
    assert high[:2].tolist() == [torch.inf, -torch.inf]
    assert not middle[:2].any()
    assert not low[:2].any()
    assert (high + middle + low)[2:].isnan().all()


@pytest.mark.parametrize("parts_of_a", [False, True])
def test_product_in_parts_is_as_exact_as_one_of_float32(parts_of_a):
    make = torch.Generator().manual_seed(1)
    a, b = torch.randn(16, 256, generator=make), torch.randn(256, 32, generator=make)
    # The other operand is what bfloat16 holds; the interpreter computes in float32, where its products are exact, too.
    a, b = (a, b.bfloat16().float()) if parts_of_a else (a.bfloat16().float(), b)
    out = torch.full((16, 32), torch.nan)
    _product_kernel[(1,)](a, b, out, parts_of_a, M=16, N=32, K=64)
    exact = a.double() @ b.double()
    error, plain = ((each.double() - exact).abs().max() for each in (out, a @ b))
    assert error <= 2 * plain + 2 * EPS * exact.abs().max()
    # Three TF32 products leave out the last bits of an operand, which are more than all roundings of such a sum.
    assert error <= 16 * EPS * exact.abs().max()
