"""Lightning Fabric: a backward that divides by the accumulation steps and lets the auxiliary losses follow.

with fabric.no_backward_sync(model, enabled=accumulating):
    backward(fabric, criterion(model(images), labels), steps=4)
"""

from typing import Any

from torch import Tensor

from vmoe_torch.layers.loss_scale import follow_loss_scale


def backward(fabric: Any, loss: Tensor, steps: int = 1, **kwargs: Any) -> None:
    """`fabric.backward(loss / steps)`, with the auxiliary losses as terms of the loss.

    Args:
        fabric: a `lightning.Fabric`.
        loss: of one element, not yet divided.
        steps: backwards before the optimiser steps, at least 1.
        **kwargs: for `fabric.backward`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    follow_loss_scale(loss)
    fabric.backward(loss / steps, **kwargs)
