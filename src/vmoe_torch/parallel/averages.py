"""Moving averages of threshold routers, alike in all processes although each has images of its own."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vmoe_torch.layers import Threshold


def share_thresholds(model: nn.Module) -> nn.Module:
    """Makes the thresholds that training finds those of all processes, from the next forward on.

    After every forward in training mode, which all processes must run together, each has the mean over processes: one
    collective for all layers, for which no host waits on a GPU. `parallelize` and `vmoe train` do this themselves.

    Args:
        model: with threshold routers or without, as DistributedDataParallel wraps it; it gets a hook.

    Returns:
        The model.
    """
    model.register_forward_hook(_average)
    return model


# A collective between compiled parts, not in them.
@torch.compiler.disable
def _average(model: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
    average_thresholds(model)


@torch.no_grad()
def average_thresholds(model: nn.Module) -> None:
    """Gives the threshold routers that are in training mode the mean over all processes of what each has found."""
    world = dist.get_world_size()
    found = [module.thresholds for module in model.modules() if isinstance(module, Threshold) and module.training]
    if world == 1 or not found:
        return
    mean = torch.stack(found)
    dist.all_reduce(mean)
    mean /= world
    for thresholds, own in zip(found, mean):
        thresholds.copy_(own)
