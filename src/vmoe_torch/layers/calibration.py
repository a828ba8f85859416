"""Thresholds for a trained model: those at which its layers keep a wanted number of experts per token on given images.

No training is needed, and the model's own router stays: the gates of a V-MoE already say which choices matter least.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vmoe_torch.layers import thresholds
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.moe_mlp import MoeMlp

# Batches of images (B, C, H, W), alone or before labels; a tensor is one batch.
Images = Tensor | Iterable[Tensor | Sequence[Tensor]]


@torch.no_grad()
def find_thresholds(model: nn.Module, layers: Mapping[str, MoeMlp], data: Images) -> dict[str, float]:
    """For each layer the least gate of the choices to keep, if it keeps `mean_selected_experts` per token on images.

    All layers are found in one pass: each keeps the largest gates of its groups meanwhile, so that the ones behind it
    see what they will see. The model runs on the device of its parameters, and stays as it is.

    Args:
        model: that takes a batch of images, in eval mode.
        layers: of the model, by name; of top experts or threshold, with mean_selected_experts set to one number.
        data: images; more change less: with some hundred the mean on others is met to a few hundredths.

    Returns:
        {name: threshold}.

    Raises:
        ValueError: if there is no image.
    """
    routers = {name: layer.own_router() for name, layer in layers.items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    device = next(model.parameters()).device
    try:
        for name, router in routers.items():
            router.selection = functools.partial(_largest, seen[name], router.capacity_mean)
        for batch in [data] if isinstance(data, Tensor) else data:
            images = batch if isinstance(batch, Tensor) else batch[0]
            if len(images) > 0:
                model(images.to(device))
    finally:
        for router in routers.values():
            router.selection = None
    if not all(seen.values()):
        raise ValueError("data must hold at least one image, got none")
    return {name: _threshold(torch.cat(gates), routers[name].capacity_mean) for name, gates in seen.items()}


def _largest(seen: list[Tensor], mean: float, gates: Tensor, groups: Groups) -> Tensor:
    seen.append(gates.cpu())
    places, _ = thresholds.ranked(gates, groups.size)
    return thresholds.largest(places, groups.size, (mean,))


def _threshold(gates: Tensor, mean: float) -> float:
    if mean >= gates.shape[1]:
        return 0.0
    kept = thresholds.kept_number(len(gates), mean)
    return float(gates.flatten().kthvalue(gates.numel() - kept + 1).values)
