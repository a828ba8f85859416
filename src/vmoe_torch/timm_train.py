"""Device module for timm's unmodified train.py: registers the models and keeps the auxiliary loss at the right scale.

    train.py --device-modules vmoe_torch.timm_train --model vmoe_s32 ...

train.py may multiply its loss before the backward: by a GradScaler's scale, by one over the accumulation steps, by a
batch-size correction. The injected gradient of the auxiliary loss has to be multiplied by the same number, which is the
gradient that arrives at the loss. So importing this module makes every timm training task (`timm.task.TrainingTask` and
its subclasses, whenever defined) put a hook on the loss it returns. The hook runs before any layer's backward, hands
that gradient to `vmoe_torch.layers.set_auxiliary_gradient_scale` on the device, without waiting for it, and lets the
scale go back to 1 when the backward has ended. Importing it twice, or reloading it, changes nothing.

Without this module (`import vmoe_torch` alone) the scale is 1, which is right where the loss is not multiplied:
float32 and bfloat16 without accumulation.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

try:
    from timm.task import TrainingTask
except ImportError as error:
    import timm

    raise ImportError(
        f"vmoe_torch.timm_train needs timm.task, the training tasks of timm >= 1.0.23, got timm {timm.__version__}"
    ) from error

import vmoe_torch  # noqa: F401  (registers the models)
from vmoe_torch.layers import set_auxiliary_gradient_scale


def follow_loss_scale(loss: Tensor) -> None:
    """Makes the auxiliary gradient of the coming backward follow the gradient that this loss receives.

    Args:
        loss: 0-dim loss, before the loop multiplies it; nothing happens if it needs no gradient.
    """
    if loss.requires_grad:
        loss.register_hook(_use_gradient_as_scale)


def _use_gradient_as_scale(gradient: Tensor) -> None:
    device = gradient.device
    set_auxiliary_gradient_scale(gradient.detach())
    Variable._execution_engine.queue_callback(lambda: set_auxiliary_gradient_scale(1.0, device))


def _call(self: TrainingTask, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """nn.Module's call, and the hook on the loss that comes out; outermost, so a subclass may combine losses."""
    result = nn.Module.__call__(self, *args, **kwargs)
    if torch.is_grad_enabled():
        follow_loss_scale(result["loss"])
    return result


TrainingTask.__call__ = _call
