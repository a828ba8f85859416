"""The auxiliary gradient under transformers' Trainer is that of a loss averaged over the accumulation steps."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import vmoe_torch
from tests.helpers.auxiliary import assert_multiplier_is_one, batches, multipliers, reference, tiny

transformers = pytest.importorskip("transformers", reason="transformers is not installed: it is in the extra `interop`")
pytest.importorskip("accelerate", reason="accelerate is not installed: it is in the extra `interop`")


class Images(Dataset):
    """Four batches of four images, in order."""

    def __init__(self):
        self.images = torch.cat(batches(4))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": torch.tensor(index % 3)}


class Classifier(nn.Module):
    """A model in the words of the Trainer."""

    def __init__(self):
        super().__init__()
        self.vit = tiny()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.vit(pixel_values)
        return {"loss": 0.0 * logits.sum(), "logits": logits}


class ItemClassifier(Classifier):
    """Divides by the items of all accumulation steps itself."""

    def forward(self, pixel_values: Tensor, labels: Tensor, num_items_in_batch=None, **kwargs) -> dict[str, Tensor]:
        assert num_items_in_batch is not None
        return super().forward(pixel_values, labels)


class Frozen(torch.optim.SGD):
    """Leaves everything as it is, gradients too."""

    def step(self, closure=None):
        pass

    def zero_grad(self, set_to_none=True):
        pass


def fit(kind: type, model: nn.Module, steps: int, tmp_path, scaler=None, **options) -> nn.Module:
    """One update, whose gradients stay; in float32, also with a scaler."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = kind(
        model,
        arguments,
        train_dataset=Images(),
        optimizers=(Frozen(model.parameters(), lr=0.0), None),
        **options,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    # The Trainer's last act on gradients.
    model.zero_grad = lambda *_, **__: None
    trainer.accelerator.scaler = scaler
    trainer.train()
    return model.vit


def item_loss(outputs, labels, num_items_in_batch):
    assert num_items_in_batch is not None
    return outputs["loss"]


CASES = {
    "mean": (Classifier, {}),
    "items": (ItemClassifier, {}),
    "function": (Classifier, {"compute_loss_func": item_loss}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 4])
def test_trainer_that_follows(case, steps, tmp_path):
    from vmoe_torch.trainers.transformers import FollowLossScale

    class Trainer(FollowLossScale, transformers.Trainer):
        pass

    model, options = CASES[case]
    assert_multiplier_is_one(fit(Trainer, model(), steps, tmp_path, **options), reference(batches(4)[:steps]))


def test_trainer_that_follows_a_scaler(tmp_path):
    from vmoe_torch.trainers.transformers import FollowLossScale

    class Trainer(FollowLossScale, transformers.Trainer):
        pass

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # Unscaled by the optimizer's step.
    assert_multiplier_is_one(fit(Trainer, Classifier(), 2, tmp_path, scaler), reference(batches(2)))
    assert scaler.get_scale() == 1024.0


def test_trainer_that_does_not_follow_is_told(tmp_path):
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match="vmoe_torch.trainers"):
        model = fit(transformers.Trainer, Classifier(), 4, tmp_path)
    assert multipliers(model, reference(batches(4))) == pytest.approx([4.0, 4.0], rel=1e-5)
