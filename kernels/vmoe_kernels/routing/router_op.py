"""Router: tokens to logits, gates, chosen experts, and the per-group sums that the auxiliary losses need.

Paper: arXiv 2106.05974, section 2.2 and appendix A. Softmax comes before top-k and the gates are not renormalised.
Noise with standard deviation noise_std / E is added to the logits; importance uses the noise-free gates.

Dims: T tokens, D width, E experts, K selected, G groups of S tokens (the last one may be smaller).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_draws, check_integer, check_number, check_seed, check_selected
from vmoe_kernels.common.flops import linear_flops
from vmoe_kernels.common.groups import group_mean, group_parts, group_sizes, group_sum, num_groups
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    INTERPRET,
    accumulation_dtype,
    check_floating,
    no_autocast,
    register_triton,
    use_reference,
)
from vmoe_kernels.common.philox import philox_normal
from vmoe_kernels.common.transforms import differs_backward, twin_gradients

# Standard deviations at which a normal density stops falling (at 2e-27) and a tail (2e-28) is 0: over the subnormal
# numbers further out a CPU takes ten times as long.
_FAR = 11.0
# Floats of a CPU's vector: what goes over fewer experts takes up to six times as long as over as many long rows.
_VECTOR = 16


class RouterOutput(NamedTuple):
    """What a router says of every token; all float results are float32 (float64 for float64 inputs)."""

    gates: Tensor
    """(T, K) combine weights, largest first, not renormalised."""
    experts: Tensor
    """(T, K) int32 expert of each choice."""
    logits: Tensor
    """(T, E) without noise."""
    importance: Tensor
    """(G, E) sum over the group's tokens of the noise-free gates."""
    load: Tensor
    """(G, E) mean probability of being selected if the noise were redrawn; 0 without noise."""
    mean_gates: Tensor
    """(G, E) mean of the gates that routing used (noisy where there is noise)."""
    top1_share: Tensor
    """(G, E) share of the group's tokens whose first choice is the expert; no gradient."""


@no_autocast
def router_reference(
    x: Tensor,
    weight: Tensor,
    num_selected_experts: int,
    group_size: int,
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
) -> RouterOutput:
    """Eager twin of `router`: differentiable PyTorch that defines the op; noise (T, E) may be drawn already."""
    return _scored(x, weight, None, num_selected_experts, group_size, noise_std, seed, noise)


def _scored(
    x: Tensor,
    weight: Tensor,
    experts: Tensor | None,
    num_selected_experts: int,
    group_size: int,
    noise_std: float,
    seed: Tensor | None,
    noise: Tensor | None,
) -> RouterOutput:
    """The twin; with `experts` (T, K) int64 those are taken as chosen already."""
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    dtype = accumulation_dtype(x.dtype)
    logits = x.to(dtype) @ weight.to(dtype).t()
    if noise_std > 0:
        scores = _with_noise(logits, noise_std, seed, noise)
        (clean, noisy), (probs, noisy_probs) = scores.unbind(), _softmax(scores).unbind()
    else:
        probs = noisy_probs = _softmax(logits)
    if experts is None:
        experts = top_experts(noisy_probs.detach(), num_selected_experts)
    gates = noisy_probs.gather(1, experts)
    groups = num_groups(num_tokens, group_size)
    load = probs.new_zeros(groups, num_experts)
    if noise_std > 0:
        threshold = noisy.gather(1, experts[:, -1:])
        load = group_mean(_normal_cdf((clean - threshold) * (num_experts / noise_std)), group_size)
    first = torch.zeros_like(probs).scatter(1, experts[:, :1], 1.0)
    return RouterOutput(
        gates=gates,
        experts=experts.to(torch.int32),
        logits=logits,
        importance=group_sum(probs, group_size),
        load=load,
        mean_gates=group_mean(noisy_probs, group_size),
        top1_share=group_mean(first, group_size),
    )


def _few_experts(device: torch.device, num_experts: int) -> bool:
    """Whether a (..., E) is to lie in memory expert by expert: on a CPU what goes over them is faster then."""
    return device.type == "cpu" and num_experts < _VECTOR


def _with_noise(logits: Tensor, noise_std: float, seed: Tensor | None, noise: Tensor | None) -> Tensor:
    """(2, T, E): the logits, and with noise (drawn already or now); in memory expert by expert if that is faster."""
    by_expert = _few_experts(logits.device, logits.shape[1])
    if noise is None:
        noise = philox_normal(seed, *logits.shape, by_column=by_expert)
    noise = noise.to(logits.dtype) * (noise_std / logits.shape[1])
    if by_expert:
        logits, noise = logits.t().contiguous(), noise.t()
        return torch.stack((logits, logits + noise)).transpose(1, 2)
    return torch.stack((logits, logits + noise))


def _softmax(scores: Tensor) -> Tensor:
    """(..., T, E) over the experts; in memory as `_with_noise` has it."""
    if _few_experts(scores.device, scores.shape[-1]):
        return scores.transpose(-1, -2).softmax(-2).transpose(-1, -2)
    return scores.softmax(-1)


def top_experts(probs: Tensor, num_selected_experts: int) -> Tensor:
    """(T, E) -> (T, K) int64, largest first, ties to the lower index, NaN before numbers (as torch.topk has it)."""
    # Twice as fast as argmax on a CPU.
    chosen = [probs.max(1, keepdim=True).indices]
    for _ in range(num_selected_experts - 1):
        # Not in place, for which vmap has no rule.
        probs = probs.scatter(1, chosen[-1], -1.0)
        chosen.append(probs.max(1, keepdim=True).indices)
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)


def _normal_cdf(z: Tensor) -> Tensor:
    return torch.erf(z * 0.5**0.5) * 0.5 + 0.5


# The twin is the CPU's implementation.
_router_op = torch.library.custom_op(
    "vmoe::router",
    router_reference,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, SymInt num_selected_experts, SymInt group_size, float noise_std, Tensor? seed, "
    "Tensor? noise=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_router_op.register_fake
def _(x, weight, num_selected_experts, group_size, noise_std, seed, noise=None):
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    groups = num_groups(num_tokens, group_size)
    dtype = accumulation_dtype(x.dtype)
    per_group = [x.new_empty((groups, num_experts), dtype=dtype) for _ in range(4)]
    return (
        x.new_empty((num_tokens, num_selected_experts), dtype=dtype),
        x.new_empty((num_tokens, num_selected_experts), dtype=torch.int32),
        x.new_empty((num_tokens, num_experts), dtype=dtype),
        *per_group,
    )


@torch.library.custom_op("vmoe::router_backward", mutates_args=(), device_types="cpu")
@no_autocast
def _router_backward_op(
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
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype, num_experts = logits.dtype, logits.shape[1]
    noisy, scale = logits, noise_std / num_experts
    if noise_std > 0:
        logits, noisy = _with_noise(logits, noise_std, seed, noise).unbind()
    chosen = experts.long()
    sizes = group_sizes(logits, group_size)

    grad = torch.zeros_like(logits) if d_logits is None else d_logits.clone()
    # Through the gates that routing used.
    if d_gates is not None or d_mean_gates is not None:
        d_probs = torch.zeros_like(logits)
        if d_mean_gates is not None:
            for part, each in group_parts(d_probs, d_mean_gates / sizes, group_size):
                part += each
        if d_gates is not None:
            d_probs.scatter_add_(1, chosen, d_gates)
        grad += _softmax_backward(d_probs, _softmax(noisy))
    # Through the noise-free gates.
    if d_importance is not None:
        d_probs = torch.zeros_like(logits)
        for part, each in group_parts(d_probs, d_importance, group_size):
            part += each
        grad += _softmax_backward(d_probs, _softmax(logits))
    # Through the probability of being selected and its threshold, the k-th largest noisy logit.
    if d_load is not None and noise_std > 0:
        z = (logits - noisy.gather(1, chosen[:, -1:])).div_(scale).clamp_(-_FAR, _FAR)
        d_z = (z * -0.5).mul_(z).exp_().mul_(0.3989422804014327 / scale)
        for part, each in group_parts(d_z, d_load / sizes, group_size):
            part *= each
        grad += d_z
        grad.scatter_add_(1, chosen[:, -1:], -d_z.sum(1, keepdim=True))
    d_x = (grad @ weight.to(dtype)).to(x.dtype)
    d_weight = (grad.t() @ x.to(dtype)).to(weight.dtype)
    return d_x, d_weight


def _softmax_backward(d_probs: Tensor, probs: Tensor) -> Tensor:
    return probs * (d_probs - (d_probs * probs).sum(-1, keepdim=True))


@_router_backward_op.register_fake
def _(x, weight, *_):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.custom_op(
    "vmoe::router_noise",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor seed, SymInt num_tokens, SymInt num_experts) -> Tensor",
)
def _router_noise_op(seed, num_tokens, num_experts):
    return philox_normal(seed, num_tokens, num_experts, by_column=_few_experts(seed.device, num_experts))


@_router_noise_op.register_fake
def _(seed, num_tokens, num_experts):
    if _few_experts(seed.device, num_experts):
        return seed.new_empty((num_experts, num_tokens), dtype=torch.float32).t()
    return seed.new_empty((num_tokens, num_experts), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, _, group_size, noise_std, seed, noise = inputs
    _, experts, logits, _, _, _, top1_share = output
    ctx.save_for_backward(x, weight, logits, experts, seed, noise)
    ctx.mark_non_differentiable(experts, top1_share)
    ctx.set_materialize_grads(False)
    ctx.group_size, ctx.noise_std = group_size, noise_std


def _backward(ctx, d_gates, _experts, d_logits, d_importance, d_load, d_mean_gates, _top1):
    d_floats = (d_logits, d_importance, d_load, d_mean_gates)
    *tensors, noise = ctx.saved_tensors
    if differs_backward():
        x, weight, _, experts, seed = tensors
        # The forward's choices: another rounding of the logits could make others.
        settings = (experts.long(), experts.shape[1], ctx.group_size, ctx.noise_std, seed, noise)
        twin = no_autocast(lambda x, weight: _scored(x, weight, *settings))
        gradients = twin_gradients(twin, (x, weight), (d_gates, None, *d_floats, None))
    else:
        inputs = (*tensors, d_gates, *d_floats)
        gradients = torch.ops.vmoe.router_backward(*inputs, ctx.group_size, ctx.noise_std, noise)
    return (*gradients, None, None, None, None, None)


_router_op.register_autograd(_backward, setup_context=_setup_context)
_router_op.register_vmap(vmap.router)


@register_flop_formula(torch.ops.vmoe.router)
def _router_flops(x_shape, weight_shape, *_, **__) -> int:
    return linear_flops(x_shape[0], weight_shape)


@register_flop_formula(torch.ops.vmoe.router_backward)
def _router_backward_flops(x_shape, weight_shape, *_, **__) -> int:
    return 2 * linear_flops(x_shape[0], weight_shape)


def router(
    x: Tensor,
    weight: Tensor,
    *,
    num_selected_experts: int,
    group_size: int | None = None,
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> RouterOutput:
    """Scores every token against every expert and selects K experts for each.

    Args:
        x: (T, D) tokens, any floating dtype; logits accumulate in float32 (float64 for float64).
        weight: (E, D) router weight, no bias.
        num_selected_experts: K, in 1..E.
        group_size: S, tokens per group for the per-group sums; None is one group of all tokens.
        noise_std: noise is N(0, (noise_std / E)^2) per logit; 0 is deterministic.
        seed: 0-dim int64 Philox key on the device of `x`; needed with noise.
        impl: "auto", "triton" or "reference".

    Returns:
        RouterOutput.

    Raises:
        ValueError: if shapes, dtypes, devices or K disagree, or noise comes without a seed.
    """
    check_floating(x=x, weight=weight)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x (T, D) and weight (E, D) must agree, got {tuple(x.shape)} and {tuple(weight.shape)}")
    num_experts = weight.shape[0]
    num_selected_experts = check_selected(num_selected_experts, num_experts)
    group_size = max(x.shape[0], 1) if group_size is None else group_size
    group_size = check_integer("group_size", group_size, 1, "at least 1 token")
    noise_std = check_number("noise_std", noise_std, "at least 0", 0.0)
    if noise_std > 0:
        check_seed(seed, x.device, "noise_std > 0")
        check_draws("tokens times experts", x.shape[0] * num_experts)
    options = (num_selected_experts, group_size, noise_std, seed)
    if use_reference(impl, x, weight, routing=(num_experts, num_selected_experts)):
        return router_reference(x, weight, *options)
    noise = None
    if noise_std > 0 and x.device.type == "cpu" and not INTERPRET:
        # A CPU keeps it for the backward; the Triton kernels draw it again, which costs them nothing.
        noise = torch.ops.vmoe.router_noise(seed, x.shape[0], num_experts)
    return RouterOutput(*torch.ops.vmoe.router(x, weight, *options, noise))


if HAS_TRITON:
    from vmoe_kernels.routing.triton_router import router_triton
    from vmoe_kernels.routing.triton_router_backward import router_backward_triton

    register_triton(_router_op, router_triton)
    register_triton(_router_backward_op, router_backward_triton)
