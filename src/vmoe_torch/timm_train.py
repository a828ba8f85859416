"""Device module for timm's unmodified train.py: registers the models and keeps the auxiliary loss at the right scale.

    train.py --device-modules vmoe_torch.timm_train --model vmoe_s32 ...

train.py may multiply its loss before the backward: by a GradScaler's scale, by one over the accumulation steps, by a
batch-size correction. The injected gradient of the auxiliary loss has to be multiplied by the same number. So importing
this module makes every timm training task (`timm.task.TrainingTask` and its subclasses, whenever defined) follow the
loss it returns (`vmoe_torch.follow_loss_scale`). Importing it twice, or reloading it, changes nothing.

Without this module (`import vmoe_torch` alone) the factor is 1, which is right where the loss is not multiplied:
float32 and bfloat16 without accumulation.
"""

from typing import Any

import torch
from torch import Tensor, nn

try:
    from timm.task import TrainingTask
except ImportError as error:
    import timm

    raise ImportError(
        f"vmoe_torch.timm_train needs timm.task, the training tasks of timm >= 1.0.23, got timm {timm.__version__}"
    ) from error

from vmoe_torch import follow_loss_scale  # registers the models too


def _call(self: TrainingTask, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """nn.Module's call, and the hook on the loss that comes out; outermost, so a subclass may combine losses."""
    result = nn.Module.__call__(self, *args, **kwargs)
    if torch.is_grad_enabled():
        follow_loss_scale(result["loss"])
    return result


TrainingTask.__call__ = _call
