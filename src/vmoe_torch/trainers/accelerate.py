"""accelerate: every loss that goes through the accelerator's backward is followed.

accelerator = follow(Accelerator(gradient_accumulation_steps=4))
...
accelerator.backward(loss)
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from vmoe_torch.layers.loss_scale import follow_loss_scale

Accelerating = TypeVar("Accelerating")


def follow(accelerator: Accelerating, weight: Callable[[], float] = lambda: 1.0) -> Accelerating:
    """Makes `accelerator.backward` follow its loss, before accelerate divides and scales it.

    Args:
        accelerator: an `accelerate.Accelerator`; changed in place, once.
        weight: gives the weight for `vmoe_torch.follow_loss_scale` at each backward.

    Returns:
        The accelerator.
    """
    backward = accelerator.backward
    if not hasattr(backward, "vmoe_follows"):

        @functools.wraps(backward)
        def followed(loss: Tensor, **kwargs: Any) -> None:
            follow_loss_scale(loss, weight())
            backward(loss, **kwargs)

        followed.vmoe_follows = True
        accelerator.backward = followed
    return accelerator
