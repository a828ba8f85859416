"""Auxiliary losses of the router, as pure functions (arXiv 2106.05974, appendix A; GShard: arXiv 2006.16668).

Every function works on the last two dims, (S, E) of one group, and returns one loss per leading index, in float32
(float64 for float64): a sum over tokens leaves float16's range.
"""

import torch
from torch import Tensor

from vmoe_torch.layers.sizes import ExpertSizes


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype that losses are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cv_squared(per_expert: Tensor) -> Tensor:
    """Squared coefficient of variation over experts, (std / mean)^2 with the population std.

    Written as variance over squared mean, so that the gradient at perfect balance is 0 and not 0/0. Where no expert has
    anything, which would be 0/0, it is 0.

    Args:
        per_expert: (..., E).

    Returns:
        (...).
    """
    per_expert = _wide(per_expert)
    mean = per_expert.mean(-1, keepdim=True)
    absent = mean.detach().abs() < 1e-30
    return ((per_expert - mean) / torch.where(absent, torch.inf, mean)).square().mean(-1)


def cv_squared_by_size(per_expert: Tensor, sizes: ExpertSizes) -> Tensor:
    """`cv_squared` of the experts of each size among themselves, summed over sizes; of one size it is `cv_squared`.

    Args:
        per_expert: (..., E).
        sizes: of the experts.

    Returns:
        (...).
    """
    parts = sizes.parts(per_expert)
    if len(parts) == 1:
        return cv_squared(per_expert)
    return torch.stack([cv_squared(part) for part in parts]).sum(0)


def size_loss(mean_gates: Tensor, sizes: ExpertSizes) -> Tensor:
    """Sum over experts of (mean gate) * H_e / max(H): what share of the widest expert a token is sent to on average.

    Args:
        mean_gates: (..., E).
        sizes: of the experts.

    Returns:
        (...).
    """
    mean_gates, largest = _wide(mean_gates), sizes.groups[0].hidden
    parts = zip(sizes.parts(mean_gates), sizes.groups)
    return torch.stack([part.sum(-1) * (group.hidden / largest) for part, group in parts]).sum(0)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of the squared log of the softmax's denominator, which keeps logits small (arXiv 2202.08906).

    Args:
        logits: (..., S, E) without noise.

    Returns:
        (...).
    """
    return _wide(logits).logsumexp(-1).square().mean(-1)


def importance_loss(logits: Tensor) -> Tensor:
    """CV^2 of the summed noise-free gates.

    Args:
        logits: (..., S, E) without noise.

    Returns:
        (...).
    """
    return cv_squared(_wide(logits).softmax(-1).sum(-2))


def load_loss(logits: Tensor, noisy_logits: Tensor, noise_std: float, num_selected_experts: int) -> Tensor:
    """CV^2 of the mean probability of being selected, were the noise redrawn.

    Args:
        logits: (..., S, E) without noise.
        noisy_logits: (..., S, E) that routing used; its k-th largest value is the threshold.
        noise_std: standard deviation of the noise on a logit (the router's noise_std / E).
        num_selected_experts: K.

    Returns:
        (...).
    """
    logits, noisy_logits = _wide(logits), _wide(noisy_logits)
    threshold = noisy_logits.topk(num_selected_experts, dim=-1).values[..., -1:]
    return cv_squared(torch.special.ndtr((logits - threshold) / noise_std).mean(-2))


def gshard_loss(gates: Tensor) -> Tensor:
    """E^2 times the mean over experts of (share of first choices) * (mean gate).

    Args:
        gates: (..., S, E) softmax that routing used.

    Returns:
        (...).
    """
    gates = _wide(gates)
    first = torch.nn.functional.one_hot(gates.argmax(-1), gates.shape[-1]).to(gates.dtype)
    return gshard_from_means(first.mean(-2), gates.mean(-2))


def gshard_from_means(top1_share: Tensor, mean_gates: Tensor) -> Tensor:
    """GShard loss from the two per-expert means, (..., E) each."""
    top1_share, mean_gates = _wide(top1_share), _wide(mean_gates)
    return (top1_share * mean_gates).mean(-1) * top1_share.shape[-1] ** 2
