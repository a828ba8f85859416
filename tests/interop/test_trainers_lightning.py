"""The auxiliary gradient under Lightning and Fabric is that of a loss averaged over the accumulation steps."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import vmoe_torch
from tests.helpers.auxiliary import assert_multiplier_is_one, batches, multipliers, no_loss, reference, tiny

lightning = pytest.importorskip("lightning", reason="lightning is not installed: it is in the extra `interop`")


class Classifier(lightning.LightningModule):
    """Keeps its gradients, unscaled."""

    def __init__(self, automatic: bool = True):
        super().__init__()
        self.model = tiny()
        self.automatic_optimization = automatic

    def training_step(self, x, index):
        loss = no_loss(self.model(x), x)
        if self.automatic_optimization:
            return loss
        vmoe_torch.follow_loss_scale(loss)
        self.manual_backward(loss / self.trainer.num_training_batches)
        return None

    def on_before_optimizer_step(self, optimizer):
        self.gradients = [layer.router.weight.grad.clone() for layer in vmoe_torch.moe_layers(self).values()]

    def on_train_end(self):
        if self.automatic_optimization:
            for layer, gradient in zip(vmoe_torch.moe_layers(self).values(), self.gradients):
                layer.router.weight.grad = gradient

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module, steps: int, callbacks: list, scaler=None, **options) -> nn.Module:
    plugins = []
    if scaler is not None:
        from lightning.pytorch.plugins.precision import MixedPrecision

        plugins.append(MixedPrecision("16-mixed", "cpu", scaler))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        plugins=plugins,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(batches(steps), batch_size=None))
    assert "backward" not in vars(trainer.strategy)
    return module.model


@pytest.mark.parametrize("steps", [1, 4])
def test_lightning_that_follows(steps):
    from vmoe_torch.trainers.lightning import FollowLossScale

    model = fit(Classifier(), steps, [FollowLossScale()], accumulate_grad_batches=steps)
    assert_multiplier_is_one(model, reference(batches(steps)))


def test_lightning_that_follows_a_scaler():
    from vmoe_torch.trainers.lightning import FollowLossScale

    class Whole(Classifier):
        """Scaled, but in float32."""

        def training_step(self, x, index):
            with torch.autocast("cpu", enabled=False):
                return super().training_step(x, index)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = fit(Whole(), 2, [FollowLossScale()], scaler, accumulate_grad_batches=2)
    assert_multiplier_is_one(model, reference(batches(2)))


def test_lightning_by_hand():
    from vmoe_torch.trainers.lightning import FollowLossScale

    assert_multiplier_is_one(fit(Classifier(automatic=False), 4, [FollowLossScale()]), reference(batches(4)))


def test_lightning_that_does_not_follow_is_told():
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match="vmoe_torch.trainers"):
        model = fit(Classifier(), 4, [], accumulate_grad_batches=4)
    assert multipliers(model, reference(batches(4))) == pytest.approx([4.0, 4.0], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_fabric_that_follows(steps):
    from vmoe_torch.trainers.fabric import backward

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = tiny()
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for x in batches(steps):
        backward(fabric, no_loss(wrapped(x), x), steps)
    assert_multiplier_is_one(model, reference(batches(steps)))


def test_fabric_steps_must_be_positive():
    from vmoe_torch.trainers.fabric import backward

    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        backward(None, torch.zeros(()), 0)
