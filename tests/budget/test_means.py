"""A budget may use the mean number of experts per token of a model that was trained by threshold."""

import pytest
import torch

import vmoe_torch
from tests.tiny import dropping, grey_images
from vmoe_torch.budget import LayerSetting, set_budget


@pytest.fixture
def model():
    made = dropping(router="threshold", mean_selected_experts=1.5, noise_std=0.0, capacity_factor=2.0)
    with torch.no_grad():
        made.train()(grey_images(16))
    return made.eval()


def test_means_are_among_what_is_tried(model):
    images = grey_images(16)
    before = model(images)
    budget = set_budget(model, flops=0.7, data=[images])
    tried = {setting.mean_selected_experts for each in budget.candidates for setting in each.settings.values()}
    assert {None, 1.5, 1.75, 1.25, 0.5} <= tried
    assert budget.chosen.cost <= budget.limit
    chosen = [layer.mean_selected_experts for layer in vmoe_torch.moe_layers(model).values()]
    assert chosen == [setting.mean_selected_experts for setting in budget.chosen.settings.values()]
    budget.revert(model)
    assert torch.equal(model(images), before)


def test_a_mean_that_is_asked_for(model):
    setting = LayerSetting(2, 2.0, True, 0.5)
    budget = set_budget(model, flops=0.9, data=[grey_images(16)], settings=[setting])
    assert [layer.mean_selected_experts for layer in vmoe_torch.moe_layers(model).values()] == [0.5, 0.5]
    assert "K=2 C=2 BPR mean=0.5" in str(budget)
    assert str(budget).splitlines()[4].split() == ["blocks.0.mlp", "2", "2", "BPR", "0.5"]


def test_a_threshold_that_was_found_stays_with_the_present_setting():
    model, images = dropping(capacity_factor=2.0), grey_images(16)
    vmoe_torch.set_routing(model, mean_selected_experts=1.4, data=images)
    want = [layer.routing() for layer in vmoe_torch.moe_layers(model).values()]
    before = model(images)
    budget = set_budget(model, flops=0.5, data=[images])
    assert not torch.equal(model(images), before)
    budget.revert(model)
    assert torch.equal(model(images), before)
    assert want == [layer.routing() for layer in vmoe_torch.moe_layers(model).values()]
    assert str(LayerSetting(2, 1.0, False, (1.0, 1.5), 0.25)) == "K=2 C=1 vanilla mean=1.5 threshold=0.25"
