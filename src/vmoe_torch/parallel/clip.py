"""Gradient clipping by one global norm over parameters that live on different meshes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe_torch.parallel.mesh import by_mesh


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their global norm is at most `max_norm`, as one process would.

    torch's own function cannot mix meshes: here every mesh gives its squared norm, and the sum is shared.

    Args:
        parameters: of a model, parallelised or not.
        max_norm: infinity only measures.

    Returns:
        0-dim norm before clipping, float32 or wider, the same on every rank.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = None
    for group in by_mesh(gradients):
        norm = torch.nn.utils.get_total_norm(group)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        square = norm.to(torch.promote_types(norm.dtype, torch.float32)) ** 2
        total = square if total is None else total + square
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale.to(local.device, local.dtype))
    return norm
