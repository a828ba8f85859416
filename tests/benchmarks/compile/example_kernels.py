"""Small kernels with known properties for the tests of the compile report."""

import triton
import triton.language as tl

from vmoe_kernels.common.launch import CompileCase


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


def product_case(name: str, dtype: str, precision: str = "tf32", block: int = 64, **options) -> CompileCase:
    pointers = dict.fromkeys(("a", "b", "c"), f"*{dtype}")
    return CompileCase(
        name=name,
        kernel=product,
        signature={**pointers, "K": "i32"},
        constexprs={"BLOCK": block, "PRECISION": precision},
        **{"num_warps": 4, "num_stages": 2, "has_dot": True, "divisible": ("K",), **options},
    )


def sums_case(name: str, size: int, num_warps: int) -> CompileCase:
    return CompileCase(name, running_sums, {"x": "*fp32", "y": "*fp32"}, {"SIZE": size}, num_warps)


COMPILE_CASES = [product_case("product/bf16", "bf16"), sums_case("running_sums/1024", 1024, 4)]
