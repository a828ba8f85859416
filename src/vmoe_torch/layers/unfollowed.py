"""A loop that multiplies its loss and has not said so is told, for its auxiliary losses are off by that factor.

Two things give such a loop away when a layer injects under a loss that nobody follows: a gradient that is still there
though no optimiser has stepped since the last backward, and a GradScaler that has scaled. Nothing is kept but weak
references to parameters, and nothing waits for the device.
"""

import gc
import warnings

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from vmoe_torch.layers.loss_scale import is_set_by_hand


class AuxiliaryLossWarning(UserWarning):
    """The auxiliary losses reach the routers with another factor than the loss has."""


class _Seen:
    """Of a parameter: its unfollowed backwards, and how the last of them found it. No tensor is kept."""

    def __init__(self) -> None:
        self.backwards = 0
        self.task = -1
        self.version = -1
        self.grad: tuple[int, int] | None = None  # identity and version
        self.is_stepped = False  # whether the optimiser's steps show in the version: fused ones do not
        self.is_told = False

    def accumulates(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient is added to the last backward's; to call once in each backward, before it is added."""
        before, after = self.grad, None
        if parameter.grad is not None:
            after = (id(parameter.grad), parameter.grad._version)
        self.grad = after
        if self.backwards > 0 and parameter._version != self.version:
            self.is_stepped = True
            self.version = parameter._version
            return False
        self.version = parameter._version
        if self.backwards == 0 or after is None:
            return False
        # Who steps unseen must at least write zeros: then more than the engine's one addition has changed the gradient.
        return self.is_stepped or after[1] == 0 or (before is not None and after == (before[0], before[1] + 1))


SEEN = WeakTensorKeyDictionary()
# The last backward in which a loop was told: its model's other layers keep quiet.
_told_in = -1
# The last backward in which a scaler was looked for, and whether there was one: a look serves all layers.
_looked_in: tuple[int | None, bool] = (None, False)


def note_unfollowed(parameter: nn.Parameter, task: int) -> None:
    """Warns, once for each model, if the loop around this backward accumulates or scales.

    Args:
        parameter: a leaf that the running backward trains, the router's weight if it can be had.
        task: number of the backward.
    """
    global _told_in
    seen = SEEN.setdefault(parameter, _Seen())
    if seen.is_told or seen.task == task or is_set_by_hand():
        return
    accumulates = seen.accumulates(parameter)
    seen.backwards += 1
    seen.task = task
    if _told_in == task:
        seen.is_told = True
        return
    sign = None
    if accumulates:
        sign = "gradients are accumulated over several backwards before the optimiser steps"
    # A look at every object of the process: at the first backward, the second, the fourth, ...
    elif seen.backwards & (seen.backwards - 1) == 0 and _has_scaler(task):
        sign = "a GradScaler is in use"
    if sign is None:
        return
    seen.is_told = True
    _told_in = task
    warnings.warn(
        f"{sign}, and nothing says by what the loss is multiplied: the auxiliary losses of the MoE layers get the "
        "gradient 1. Call vmoe_torch.follow_loss_scale(loss) on the loss before it is divided or scaled; if it is "
        "neither, that changes nothing but this warning. Ready pieces: vmoe_torch.trainers for transformers' Trainer, "
        "accelerate, Lightning and Fabric, vmoe_torch.timm_train for timm's train.py.",
        AuxiliaryLossWarning,
        stacklevel=2,
    )


def _has_scaler(task: int) -> bool:
    """Whether a GradScaler is in use that has scaled a loss, looked up once in a backward."""
    global _looked_in
    if _looked_in[0] != task:
        found = _scaler_lives()
        if found:
            # One that only waits for the collector, in a cycle of an earlier training's, is in nobody's use.
            gc.collect()
            found = _scaler_lives()
        _looked_in = (task, found)
    return _looked_in[1]


def _scaler_lives() -> bool:
    """Whether the process has an enabled GradScaler that has scaled: it makes its scale when it first does."""
    kinds, found = [torch.amp.GradScaler], []
    for kind in kinds:
        kinds += kind.__subclasses__()
    # Instances refer to their class.
    for holder in gc.get_referrers(*kinds):
        if isinstance(holder, torch.amp.GradScaler):
            found.append(holder.is_enabled() and getattr(holder, "_scale", None) is not None)
    return any(found)
