"""Triton kernels of the router's forward: logits, noise, softmax, top-k and per-group sums in one pass over x.

Dims: T tokens, D width, E experts, K selected, G groups of S tokens (the last one may be smaller).
A block of tokens never straddles two groups, so its per-group sums are partial sums of one group; a second, tiny kernel
adds the blocks of a group in a fixed order. No atomics: two runs agree bitwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_triton_dtypes, check_triton_routing
from vmoe_kernels.common.groups import num_groups
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table, size_bucket

EXPERT_BOUNDS = (32, 64, 128)


def _config(block_t: int, block_d: int, num_warps: int, num_stages: int, precision: str = "ieee") -> Config:
    constexprs = {"BLOCK_T": block_t, "BLOCK_D": block_d, "PRECISION": precision}
    return Config(constexprs, num_warps=num_warps, num_stages=num_stages)


# Predicted, not measured. The operands' dtypes and E choose a table, so deterministic mode changes nothing. A pass over
# x is bound by memory: at E=32 some 400 programs of 64 tokens run at once and keep over 48 KB per SM in flight. Larger
# E takes more warps, then fewer tokens: the softmax holds four (BLOCK_T, E) tiles of float32 in registers. A float32
# pair ("ieee") multiplies on the CUDA cores, which unroll BLOCK_D: 16 columns leave registers.
_FORWARD = {
    "le32": _config(64, 64, 4, 3),
    "le64": _config(64, 32, 8, 3),
    "le128": _config(64, 32, 8, 2),
    "gt128": _config(32, 32, 8, 2),
    "fp32_le32": _config(64, 16, 4, 3),
    "fp32_le64": _config(64, 16, 8, 3),
    "fp32_le128": _config(32, 16, 8, 3),
    "fp32_gt128": _config(32, 16, 8, 3),
}
for _bucket, _entry in _FORWARD.items():
    # Three TF32 products keep 22 bits of a float32 pair at tensor-core speed; to be measured against "ieee".
    _tf32 = (_config(64, 32, 8, 2, "tf32x3"),) if _bucket.startswith("fp32") else ()
    register_table(f"router_forward_{_bucket}", {(ANY, ANY, ANY): _entry}, candidates=(_config(64, 64, 8, 2), *_tf32))
_SUMS_BLOCK_B, _SUMS_BLOCK_E = 64, 16


@triton.jit
def _upper_half(x):
    """float32 with the last 16 bits cleared: a value that bfloat16 has."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_parts(x):
    """Three float32 tiles of bfloat16's values that add up to a float32 tile, bit for bit; the first is the largest.

    An infinite value is its own first part. Below 2^-110 the last part may need bits that bfloat16 lacks.
    """
    high = _upper_half(x)
    rest = tl.where(high == x, 0.0, x - high)
    middle = _upper_half(rest)
    return high, middle, rest - middle


@triton.jit
def dot_in_parts(a, b, acc, PARTS_OF_A: tl.constexpr):
    """acc + a @ b of a float32 operand, a or b, in three products with the other one's dtype, bfloat16.

    Each product of two 8-bit significands is exact, so nothing but the float32 sum rounds; small parts go first.
    """
    high, middle, low = bfloat16_parts(a if PARTS_OF_A else b)
    if PARTS_OF_A:
        acc = tl.dot(low.to(b.dtype), b, acc)
        acc = tl.dot(middle.to(b.dtype), b, acc)
        acc = tl.dot(high.to(b.dtype), b, acc)
    else:
        acc = tl.dot(a, low.to(a.dtype), acc)
        acc = tl.dot(a, middle.to(a.dtype), acc)
        acc = tl.dot(a, high.to(a.dtype), acc)
    return acc


@triton.jit
def dot_fp32(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with float32 accumulation; no operand is rounded to less than its own precision."""
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        # Each block's product is summed on its own: in one running sum every term would be rounded at the size of the
        # whole, several times the error of a library's product. Triton folds a `+` into the product, hence `fma`.
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    elif a.dtype == b.dtype:
        acc = tl.dot(a, b, acc)
    elif (a.dtype == tl.float32 and b.dtype == tl.bfloat16) or (a.dtype == tl.bfloat16 and b.dtype == tl.float32):
        acc = dot_in_parts(a, b, acc, a.dtype == tl.float32)
    else:
        # 16 bits are exact in TF32, so that three TF32 products keep the bits of a float32 operand beside them, and
        # those of bfloat16 beside float16.
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return acc


@triton.jit
def masked_softmax(logits, columns):
    """Softmax over axis 1 of the columns in the mask; others are 0. A row with NaN or +Inf is NaN throughout."""
    logits = tl.where(columns, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = exponentials / tl.sum(exponentials, axis=1)[:, None]
    return tl.where(columns, probs, 0.0)


@triton.jit
def _cosine(u):
    """cos(2 pi u) as an odd polynomial of 2 pi (1/4 - |u - round(u)|): the library's cosine uses the stack."""
    angle = 6.283185307179586 * (0.25 - tl.abs(u - tl.floor(u + 0.5)))
    square = angle * angle
    series = -2.505210838544172e-08 + square * 1.6059043836821613e-10
    series = 2.7557319223985893e-06 + square * series
    series = -1.984126984126984e-04 + square * series
    series = 8.333333333333333e-03 + square * series
    series = -1.6666666666666666e-01 + square * series
    return angle + angle * square * series


@triton.jit
def _normal_pair(bits_1, bits_2):
    """Two independent normal numbers of two random words, by Box and Muller's method."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(bits_1), 1.0e-7)))
    u = tl.uint_to_uniform_float(bits_2)
    return radius * _cosine(u), radius * _cosine(u - 0.25)


@triton.jit
def add_noise(logits, seed_ptr, rows, noise_scale, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """logits + the noise of `philox_normal`: a block of four words makes that of four experts."""
    blocks = tl.arange(0, BLOCK_E // 4)
    offset = (rows[:, None] * tl.cdiv(E, 4) + blocks[None, :]).to(tl.uint32)
    words_1, words_2, words_3, words_4 = tl.randint4x(tl.load(seed_ptr), offset)
    noise_1, noise_3 = _normal_pair(words_1, words_3)
    noise_2, noise_4 = _normal_pair(words_2, words_4)
    noise = tl.join(tl.join(noise_1, noise_3), tl.join(noise_2, noise_4))
    return logits + tl.reshape(noise, logits.shape) * noise_scale


@triton.jit(do_not_specialize=["num_tokens", "group_size", "blocks_per_group", "num_blocks"])
def _router_kernel(
    x_ptr,  # (T, D) floating
    weight_ptr,  # (E, D) floating
    seed_ptr,  # () int64, or None without noise
    gates_ptr,  # (T, K) float32
    experts_ptr,  # (T, K) int32
    logits_ptr,  # (T, E) float32
    partials_ptr,  # (4, num_blocks, E) float32: importance, load, noisy gates, first choices
    num_tokens,
    group_size,
    blocks_per_group,
    num_blocks,
    noise_scale,
    inverse_noise_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns BLOCK_T tokens of one group and all E experts."""
    block = tl.program_id(0).to(tl.int64)
    group = block // blocks_per_group
    first = group * group_size + (block % blocks_per_group) * BLOCK_T
    end = tl.minimum((group + 1) * group_size, num_tokens)
    rows = first + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    tokens = rows < end
    columns = (experts < E)[None, :]

    # Tensor cores want 64 rows; where tokens are fewer, experts are the rows.
    if BLOCK_T < 64:
        logits = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    else:
        logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + rows[:, None] * D + dims[None, :], mask=tokens[:, None] & (dims < D)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + experts[:, None] * D + dims[None, :],
            mask=(experts < E)[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        if BLOCK_T < 64:
            logits = dot_fp32(weight, tl.trans(x), logits, PRECISION)
        else:
            logits = dot_fp32(x, tl.trans(weight), logits, PRECISION)
    if BLOCK_T < 64:
        logits = tl.trans(logits)
    inside = tokens[:, None] & columns
    tl.store(logits_ptr + rows[:, None] * E + experts[None, :], logits, mask=inside)

    probs = masked_softmax(logits, columns)
    partial = partials_ptr + block * E + experts
    plane = num_blocks.to(tl.int64) * E
    tl.store(partial, tl.sum(tl.where(tokens[:, None], probs, 0.0), axis=0), mask=experts < E)
    noisy = logits
    if seed_ptr is not None:
        noisy = add_noise(logits, seed_ptr, rows, noise_scale, E, BLOCK_E)
        probs = masked_softmax(noisy, columns)
    tl.store(partial + 2 * plane, tl.sum(tl.where(tokens[:, None], probs, 0.0), axis=0), mask=experts < E)

    # Softmax rows are all NaN or free of it. NaN comes first, so an index is in range and no expert comes twice.
    keys = tl.where(probs != probs, 2.0, probs)
    keys = tl.where(columns, keys, -2.0)
    for k in tl.static_range(K):
        value, index = tl.max(keys, axis=1, return_indices=True, return_indices_tie_break_left=True)
        chosen = experts[None, :] == index[:, None]
        keys = tl.where(chosen, -1.0, keys)
        tl.store(gates_ptr + rows * K + k, tl.where(value > 1.5, float("nan"), value), mask=tokens)
        tl.store(experts_ptr + rows * K + k, index, mask=tokens)
        if k == 0:
            share = tl.sum(tl.where(tokens[:, None], chosen.to(tl.float32), 0.0), axis=0)
            tl.store(partial + 3 * plane, share, mask=experts < E)
        if k == K - 1:
            load = tl.zeros((BLOCK_E,), tl.float32)
            if seed_ptr is not None:
                threshold = tl.sum(tl.where(chosen, noisy, 0.0), axis=1)
                z = (logits - threshold[:, None]) * inverse_noise_scale
                selected = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
                load = tl.sum(tl.where(tokens[:, None], selected, 0.0), axis=0)
            tl.store(partial + plane, load, mask=experts < E)


@triton.jit(do_not_specialize=["num_tokens", "group_size", "blocks_per_group", "num_blocks"])
def _router_sums_kernel(
    partials_ptr,  # (4, num_blocks, E) float32
    importance_ptr,  # (G, E) float32, as are the next three
    load_ptr,
    mean_gates_ptr,
    top1_share_ptr,
    num_tokens,
    group_size,
    blocks_per_group,
    num_blocks,
    E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program owns one group and BLOCK_E experts: the sums of the group's blocks, in block order."""
    group = tl.program_id(0).to(tl.int64)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = experts < E
    plane = num_blocks.to(tl.int64) * E
    importance = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    load = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    noisy = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    first = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for start in range(0, blocks_per_group, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)
        pointers = partials_ptr + (group * blocks_per_group + blocks)[:, None] * E + experts[None, :]
        mask = (blocks < blocks_per_group)[:, None] & columns[None, :]
        importance += tl.load(pointers, mask=mask, other=0.0)
        load += tl.load(pointers + plane, mask=mask, other=0.0)
        noisy += tl.load(pointers + 2 * plane, mask=mask, other=0.0)
        first += tl.load(pointers + 3 * plane, mask=mask, other=0.0)
    tokens = tl.minimum(num_tokens - group * group_size, group_size).to(tl.float32)
    out = group * E + experts
    tl.store(importance_ptr + out, tl.sum(importance, axis=0), mask=columns)
    tl.store(load_ptr + out, tl.sum(load, axis=0) / tokens, mask=columns)
    tl.store(mean_gates_ptr + out, tl.sum(noisy, axis=0) / tokens, mask=columns)
    tl.store(top1_share_ptr + out, tl.sum(first, axis=0) / tokens, mask=columns)


def expert_block(num_experts: int) -> int:
    """E padded to a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(num_experts))


def _bucket_of(x: torch.dtype, weight: torch.dtype, num_experts: int) -> str:
    bucket = size_bucket(num_experts, EXPERT_BOUNDS)
    return f"fp32_{bucket}" if x == weight == torch.float32 else bucket


def router_triton(
    x: Tensor,
    weight: Tensor,
    num_selected_experts: int,
    group_size: int,
    noise_std: float,
    seed: Tensor | None,
    noise: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The `vmoe::router` op in two launches.

    Args:
        x: (T, D) float16, bfloat16 or float32.
        weight: (E, D) of one of these dtypes, E at most 256.
        num_selected_experts: K, at most 8.
        group_size: S.
        noise_std: noise is N(0, (noise_std / E)^2) per logit.
        seed: () int64, needed with noise.
        noise: None, as it is drawn here.

    Returns:
        gates (T, K), experts (T, K) int32, logits (T, E), importance, load, mean_gates and top1_share (G, E).

    Raises:
        ValueError: if E, K or a dtype is beyond the kernels.
    """
    check_triton_dtypes(x=x, weight=weight)
    check_triton_routing("router", weight.shape[0], num_selected_experts)
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    groups = num_groups(num_tokens, group_size)
    gates = x.new_empty((num_tokens, num_selected_experts), dtype=torch.float32)
    experts = torch.empty_like(gates, dtype=torch.int32)
    logits = x.new_empty((num_tokens, num_experts), dtype=torch.float32)
    sums = [x.new_empty((groups, num_experts), dtype=torch.float32) for _ in range(4)]
    if num_tokens == 0:
        return gates, experts, logits, *sums
    config = look_up(f"router_forward_{_bucket_of(x.dtype, weight.dtype, num_experts)}", x.device).kwargs()
    blocks_per_group = triton.cdiv(min(group_size, num_tokens), config["BLOCK_T"])
    num_blocks = groups * blocks_per_group
    partials = x.new_empty((4, num_blocks, num_experts), dtype=torch.float32)
    noisy = noise_std > 0
    _router_kernel[(num_blocks,)](
        x.contiguous(),
        weight.contiguous(),
        seed if noisy else None,
        gates,
        experts,
        logits,
        partials,
        num_tokens,
        group_size,
        blocks_per_group,
        num_blocks,
        noise_std / num_experts,
        num_experts / noise_std if noisy else 0.0,
        D=width,
        E=num_experts,
        K=num_selected_experts,
        BLOCK_E=expert_block(num_experts),
        **config,
    )
    _router_sums_kernel[(groups, triton.cdiv(num_experts, _SUMS_BLOCK_E))](
        partials,
        *sums,
        num_tokens,
        group_size,
        blocks_per_group,
        num_blocks,
        E=num_experts,
        BLOCK_B=_SUMS_BLOCK_B,
        BLOCK_E=_SUMS_BLOCK_E,
        num_warps=4,
    )
    return gates, experts, logits, *sums
