"""Checkpoints and metrics of other people's training loops, one step each."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.interop.requirement import needs
from vmoe_torch import routing


def _logits(model, images):
    with torch.no_grad():
        return model.eval()(images)


def test_accelerate_saves_and_loads(tiny, images, labels, tmp_path):
    accelerate = needs("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny()
    model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), 1e-2))
    accelerator.backward(cross_entropy(model(images), labels))
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, tmp_path / "model")
    wanted = _logits(model, images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    torch.testing.assert_close(_logits(model, images), wanted, rtol=0, atol=0)
    fresh = tiny()
    accelerate.load_checkpoint_in_model(fresh, tmp_path / "model")
    torch.testing.assert_close(_logits(fresh, images), wanted, rtol=0, atol=0)


def test_lightning_checkpoint_round_trip(tiny, images, labels, tmp_path):
    lightning = needs("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny()

        def training_step(self, batch, _):
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2)

    before = Classifier()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(before.train(), DataLoader(TensorDataset(images, labels), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    after = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    torch.testing.assert_close(_logits(after.model, images), _logits(before.model, images), rtol=0, atol=0)
    assert (_logits(before.model, images) - _logits(tiny(), images)).abs().max() > 0


def test_torchmetrics_of_two_settings(tiny, images):
    metrics = needs("torchmetrics")
    model = tiny()
    labels = _logits(model, images).argmax(1)
    accuracy = metrics.Accuracy(task="multiclass", num_classes=5)
    assert accuracy(_logits(model, images), labels) == 1
    with routing(model, capacity_factor=0.05, num_selected_experts=1):
        cheaper = _logits(model, images)
    assert accuracy(cheaper, labels) == (cheaper.argmax(1) == labels).float().mean()


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_timm_ema_follows_every_expert(tiny, images, labels, decay):
    from timm.utils import ModelEmaV3

    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = ModelEmaV3(model, decay=decay)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    cross_entropy(model(images), labels).backward()
    optimizer.step()
    ema.update(model, step=10_000)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ema.module.state_dict()[name], before[name].lerp(value, 1 - decay), msg=name)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.testing.assert_close(_logits(averaged, images), _logits(model, images), rtol=0, atol=0)
