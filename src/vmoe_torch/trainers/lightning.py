"""Lightning: a callback, for automatic and manual optimisation.

Trainer(callbacks=[FollowLossScale()], accumulate_grad_batches=4, precision="16-mixed")
"""

import functools
from typing import Any

from torch import Tensor

from vmoe_torch.layers.loss_scale import follow_loss_scale

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer


class FollowLossScale(Callback):
    """Follows every loss of the training, behind Lightning's division and before the precision plugin's scale.

    In manual optimisation a loop that divides its loss itself follows it before it does, with
    `vmoe_torch.follow_loss_scale`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps the strategy's backward, which both ways of optimisation go through."""
        backward = trainer.strategy.backward

        @functools.wraps(backward)
        def followed(closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # Divided already, and 1 where the optimisation is manual.
            follow_loss_scale(closure_loss, 1.0 / trainer.accumulate_grad_batches)
            return backward(closure_loss, *args, **kwargs)

        trainer.strategy.backward = followed

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the wrapper away."""
        del trainer.strategy.backward
