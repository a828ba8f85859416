"""What a layer's setting alone adds to the loss, held against whole forwards."""

import pytest
import torch
import torch.nn.functional as F

import vmoe_torch
from vmoe_torch.budget.quality import Quality
from vmoe_torch.budget.settings import LayerSetting, assigned, current_settings

OPTIONS = [LayerSetting(2, 0.5), LayerSetting(1, 0.3), LayerSetting(2, 1.05, False)]


def _loss(model, batches):
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in batches) / 64


def test_sensitivities_are_differences_of_whole_forwards(fitted):
    model, batches = fitted
    present = current_settings(model)
    quality = Quality(model, batches, present)
    centre = dict.fromkeys(present, LayerSetting(1, 0.6))
    base, added = quality.sensitivities(centre, OPTIONS)
    with assigned(model, centre):
        assert base == pytest.approx(_loss(model, batches), abs=1e-6)
        for name, values in added.items():
            for option, value in zip(OPTIONS, values):
                with assigned(model, {name: option}):
                    assert base + value == pytest.approx(_loss(model, batches), abs=1e-6)
    assert current_settings(model) == present
    assert len({round(value, 7) for values in added.values() for value in values}) > 6


def test_loss_and_accuracy_are_the_models(fitted):
    model, batches = fitted
    present = current_settings(model)
    alike = dict.fromkeys(present, OPTIONS[1])
    (loss, top1), (other, _) = Quality(model, batches, present).of([present, alike])
    assert loss == pytest.approx(_loss(model, batches), abs=1e-6)
    with torch.no_grad():
        assert top1 == sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / 64
    with vmoe_torch.routing(model, num_selected_experts=1, capacity_factor=0.3, batch_priority=True):
        assert other == pytest.approx(_loss(model, batches), abs=1e-6)


def test_without_labels_the_present_model_is_the_measure(fitted):
    model, batches = fitted
    present = current_settings(model)
    quality = Quality(model, [images for images, _ in batches], present)
    assert not quality.labelled
    same, other = quality.of([present, dict.fromkeys(present, LayerSetting(1, 0.1))])
    assert same == (pytest.approx(0, abs=1e-6), 1.0)
    assert other[0] > 1e-4
    assert other[1] <= 1.0


def test_modes_come_back(fitted):
    model, batches = fitted
    model.train()
    try:
        Quality(model, batches, current_settings(model)).of([current_settings(model)])
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


@pytest.mark.parametrize("data", [[], [torch.zeros(0, 1, 16, 16)]])
def test_no_image_is_an_error(fitted, data):
    with pytest.raises(ValueError, match="data must give at least one image, got none"):
        Quality(fitted[0], data, current_settings(fitted[0]))


def test_labels_come_with_every_batch_or_with_none(fitted):
    model, batches = fitted
    with pytest.raises(ValueError, match="with every batch or with none, got both"):
        Quality(model, [batches[0], batches[1][0]], current_settings(model))
