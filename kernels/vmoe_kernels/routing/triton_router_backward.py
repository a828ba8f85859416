"""Triton kernels of the router's backward.

Dims: T tokens, D width, E experts, K selected, G groups of S tokens (the last one may be smaller).
The first kernel turns the saved logits into their gradient, writes that (T, E) and multiplies it by the weight: one
write of d_x. The second reads x once for d_weight, split over runs of tokens whose partial sums are added in order.
The gradient crosses memory as 2 * T * E float32, a twelfth of x in bfloat16 at D=768 and E=32; keeping it in registers
would need (E, D) sums per program instead. No atomics: two runs agree bitwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_triton_dtypes, check_triton_routing
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table, size_bucket
from vmoe_kernels.routing.triton_router import (
    EXPERT_BOUNDS,
    add_noise,
    dot_fp32,
    expert_block,
    masked_softmax,
)


def _config(block_t: int, block_d: int, num_warps: int, num_stages: int, precision: str = "ieee") -> Config:
    constexprs = {"BLOCK_T": block_t, "BLOCK_D": block_d, "PRECISION": precision}
    return Config(constexprs, num_warps=num_warps, num_stages=num_stages)


# Predicted, not measured; as in the forward, dtypes and E choose, and the tiles are what registers hold. Where d_x is
# 16 bits wide, TF32 operands, which lose their last 13 bits, cost it less than bfloat16's rounding does and about as
# much as float16's.
_TOKENS = {
    "le32": _config(64, 64, 4, 2, "tf32"),
    "le64": _config(64, 64, 8, 2, "tf32"),
    "le128": _config(32, 64, 8, 1, "tf32"),
    "gt128": _config(16, 64, 8, 1, "tf32"),
    "fp32_le32": _config(64, 32, 4, 2),
    "fp32_le64": _config(32, 32, 8, 2),
    "fp32_le128": _config(32, 32, 8, 2),
    "fp32_gt128": _config(16, 32, 8, 2),
}
_WEIGHT = {
    "le32": _config(32, 128, 4, 3),
    "le64": _config(32, 64, 8, 3),
    "le128": _config(32, 64, 8, 3),
    "fp32_le32": _config(16, 64, 4, 3),
    "fp32_le64": _config(16, 32, 8, 3),
    "fp32_le128": _config(16, 32, 8, 3),
}
# Experts of one program of the d_weight kernel: sums for 256 would take more than sm_100's tensor memory.
_WEIGHT_EXPERTS = 128
for _op, _configs in (("tokens", _TOKENS), ("weight", _WEIGHT)):
    for _bucket, _entry in _configs.items():
        _tf32 = (_config(64, 64, 8, 2, "tf32x3"),) if _bucket.startswith("fp32") else ()
        register_table(f"router_backward_{_op}_{_bucket}", {(ANY, ANY, ANY): _entry}, candidates=_tf32)
# Programs of the d_weight kernel over all chips: a fixed number, so that the order of a sum is the same everywhere.
_WEIGHT_PROGRAMS = 528


@triton.jit
def _softmax_backward(d_probs, probs):
    return probs * (d_probs - tl.sum(d_probs * probs, axis=1)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "group_size"])
def _router_tokens_kernel(
    weight_ptr,  # (E, D) floating
    logits_ptr,  # (T, E) float32
    experts_ptr,  # (T, K) int32
    seed_ptr,  # () int64, or None without noise
    d_gates_ptr,  # (T, K) float32 or None
    d_logits_ptr,  # (T, E) float32 or None
    d_importance_ptr,  # (G, E) float32 or None
    d_load_ptr,  # (G, E) float32 or None; None without noise
    d_mean_gates_ptr,  # (G, E) float32 or None
    grad_ptr,  # (T, E) float32
    d_x_ptr,  # (T, D) floating
    num_tokens,
    group_size,
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
    """A program owns BLOCK_T tokens: their gradient with respect to the logits, and their d_x."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    tokens = rows < num_tokens
    columns = (experts < E)[None, :]
    inside = tokens[:, None] & columns
    own = rows[:, None] * E + experts[None, :]
    groups = rows // group_size
    per_group = groups[:, None] * E + experts[None, :]
    # At least 1: rows past the last token are in no group.
    sizes = tl.maximum(tl.minimum(num_tokens - groups * group_size, group_size), 1).to(tl.float32)[:, None]

    logits = tl.load(logits_ptr + own, mask=inside, other=0.0)
    noisy = logits
    if seed_ptr is not None:
        noisy = add_noise(logits, seed_ptr, rows, noise_scale, E, BLOCK_E)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if d_gates_ptr is not None or d_mean_gates_ptr is not None:
        d_probs = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        if d_mean_gates_ptr is not None:
            d_probs = tl.load(d_mean_gates_ptr + per_group, mask=inside, other=0.0) / sizes
        if d_gates_ptr is not None:
            for k in tl.static_range(K):
                chosen = tl.load(experts_ptr + rows * K + k, mask=tokens, other=-1)
                d_gate = tl.load(d_gates_ptr + rows * K + k, mask=tokens, other=0.0)
                d_probs += tl.where(experts[None, :] == chosen[:, None], d_gate[:, None], 0.0)
        grad += _softmax_backward(d_probs, masked_softmax(noisy, columns))
    if d_importance_ptr is not None:
        d_probs = tl.load(d_importance_ptr + per_group, mask=inside, other=0.0)
        grad += _softmax_backward(d_probs, masked_softmax(logits, columns))
    if d_load_ptr is not None:
        # Each expert's probability of being selected, and the threshold: the K-th largest noisy logit.
        last = tl.load(experts_ptr + rows * K + (K - 1), mask=tokens, other=-1)
        is_last = experts[None, :] == last[:, None]
        z = (logits - tl.sum(tl.where(is_last, noisy, 0.0), axis=1)[:, None]) * inverse_noise_scale
        d_load = tl.load(d_load_ptr + per_group, mask=inside, other=0.0) / sizes
        d_z = d_load * tl.exp(-0.5 * z * z) * (0.3989422804014327 * inverse_noise_scale)
        d_z = tl.where(columns, d_z, 0.0)
        grad += d_z - tl.where(is_last, tl.sum(d_z, axis=1)[:, None], 0.0)
    if d_logits_ptr is not None:
        grad += tl.load(d_logits_ptr + own, mask=inside, other=0.0)
    grad = tl.where(inside, grad, 0.0)
    tl.store(grad_ptr + own, grad, mask=inside)

    if BLOCK_T < 64:
        grad = tl.trans(grad)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        weight = tl.load(
            weight_ptr + experts[:, None] * D + dims[None, :],
            mask=(experts < E)[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        # Tensor cores want 64 rows; where tokens are fewer, dims are the rows.
        if BLOCK_T < 64:
            d_x = tl.trans(tl.dot(tl.trans(weight.to(tl.float32)), grad, input_precision=PRECISION))
        else:
            d_x = tl.dot(grad, weight.to(tl.float32), input_precision=PRECISION)
        tl.store(
            d_x_ptr + rows[:, None] * D + dims[None, :],
            d_x.to(d_x_ptr.dtype.element_ty),
            mask=tokens[:, None] & (dims < D)[None, :],
        )


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split"])
def _router_weight_kernel(
    x_ptr,  # (T, D) floating
    grad_ptr,  # (T, E) float32
    partials_ptr,  # (splits, E, D) float32
    num_tokens,
    tokens_per_split,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns BLOCK_D columns of d_weight of BLOCK_E experts for one run of tokens."""
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    experts = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = split * tokens_per_split
    end = tl.minimum(first + tokens_per_split, num_tokens)
    # d_weight transposed: a tile has at least 64 dims for the tensor cores' rows, but perhaps only 8 experts.
    total = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    for start in range(0, tokens_per_split, BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        tokens = (rows < end)[:, None]
        x = tl.load(x_ptr + rows[:, None] * D + dims[None, :], mask=tokens & (dims < D)[None, :], other=0.0)
        grad = tl.load(grad_ptr + rows[:, None] * E + experts[None, :], mask=tokens & (experts < E)[None, :], other=0.0)
        total = dot_fp32(tl.trans(x), grad, total, PRECISION)
    tl.store(
        partials_ptr + (split * E + experts[None, :]) * D + dims[:, None],
        total,
        mask=(experts < E)[None, :] & (dims < D)[:, None],
    )


def _bucket_of(x: torch.dtype, num_experts: int) -> str:
    bucket = size_bucket(num_experts, EXPERT_BOUNDS)
    return f"fp32_{bucket}" if x == torch.float32 else bucket


def router_backward_triton(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    experts: Tensor,
    seed: Tensor | None,
    d_gates: Tensor | None,
    d_logits: Tensor | None,
    d_importance: Tensor | None,
    d_load: Tensor | None,
    d_mean_gates: Tensor | None,
    group_size: int,
    noise_std: float,
    noise: None = None,
) -> tuple[Tensor, Tensor]:
    """The `vmoe::router_backward` op in three launches.

    Args:
        x: (T, D) float16, bfloat16 or float32.
        weight: (E, D) of one of these dtypes, E at most 256.
        logits: (T, E) float32 without noise, as the forward returned them.
        experts: (T, K) int32.
        seed: () int64 of the forward's noise, or None.
        d_gates: (T, K), d_logits: (T, E), d_importance, d_load and d_mean_gates: (G, E); float32, None where unused.
        group_size: S.
        noise_std: the forward's.
        noise: None, as it is drawn here again.

    Returns:
        d_x and d_weight, in the dtypes of x and weight; sums in float32.

    Raises:
        ValueError: if E, K or a dtype is beyond the kernels.
    """
    num_selected_experts = experts.shape[1]
    check_triton_dtypes(x=x, weight=weight)
    check_triton_routing("router", weight.shape[0], num_selected_experts)
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    d_x = x.new_empty(x.shape)
    if num_tokens == 0:
        return d_x, weight.new_zeros(weight.shape)
    noisy = noise_std > 0
    block_e = expert_block(num_experts)
    weight, logits, experts = weight.contiguous(), logits.contiguous(), experts.contiguous()
    grad = torch.empty_like(logits)
    config = look_up(f"router_backward_tokens_{_bucket_of(x.dtype, num_experts)}", x.device).kwargs()
    _router_tokens_kernel[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
        weight,
        logits,
        experts,
        seed if noisy else None,
        *(None if d is None else d.contiguous() for d in (d_gates, d_logits, d_importance)),
        d_load.contiguous() if noisy and d_load is not None else None,
        None if d_mean_gates is None else d_mean_gates.contiguous(),
        grad,
        d_x,
        num_tokens,
        group_size,
        noise_std / num_experts,
        num_experts / noise_std if noisy else 0.0,
        D=width,
        E=num_experts,
        K=num_selected_experts,
        BLOCK_E=block_e,
        **config,
    )
    block_e = min(block_e, _WEIGHT_EXPERTS)
    config = look_up(f"router_backward_weight_{_bucket_of(x.dtype, block_e)}", x.device).kwargs()
    columns = triton.cdiv(width, config["BLOCK_D"])
    splits = min(triton.cdiv(_WEIGHT_PROGRAMS, columns), triton.cdiv(num_tokens, config["BLOCK_T"]))
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    splits = triton.cdiv(num_tokens, tokens_per_split)
    partials = x.new_empty((splits, num_experts, width), dtype=torch.float32)
    _router_weight_kernel[(columns, splits, triton.cdiv(num_experts, block_e))](
        x.contiguous(),
        grad,
        partials,
        num_tokens,
        tokens_per_split,
        D=width,
        E=num_experts,
        BLOCK_E=block_e,
        **config,
    )
    return d_x, partials.sum(0).to(weight.dtype)
