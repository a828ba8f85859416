"""Evaluations at means and thresholds: thresholds are found once per setting, and choices below them are no drops."""

import math

import pytest
import torch

import vmoe_torch
from tests.tiny import dropping, grey_images
from vmoe_torch.evaluate import RoutingSetting, count_flops, evaluate, setting_grid
from vmoe_torch.layers import MoeMlp


def _loader():
    images = grey_images(24)
    return [(images[:16], torch.zeros(16, dtype=torch.int64)), (images[16:], torch.ones(8, dtype=torch.int64))]


def test_a_mean_is_reached_and_costs_less():
    model, loader = dropping(capacity_factor=2.0), _loader()
    before = [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    settings = setting_grid([2.0], [2], [True], [None, 2, 1.4], [None])
    own, full, some = evaluate(model, loader, settings, calibration=[images for images, _ in loader])
    assert (own.loss, own.flops) == (full.loss, full.flops)
    assert (own.selected, full.selected) == (2, 2)
    assert some.selected == pytest.approx(1.4, abs=0.05)
    assert some.flops.total < own.flops.total
    # A group of 8 images of 17 tokens.
    slots = 4 * math.ceil(17 * 8 * 1.4 * 2.0 / 4)
    assert some.capacity_factor == pytest.approx(3 * slots / (some.selected * 24 * 17))
    assert before == [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    with vmoe_torch.routing(model, mean_selected_experts=1.4, data=[images for images, _ in loader]):
        model(loader[0][0])
        assert count_flops(model, loader[0][0]) == some.flops


def test_choices_below_the_threshold_are_no_drops():
    model = dropping(capacity_factor=4.0)
    settings = [RoutingSetting(gate_threshold=threshold) for threshold in (0.0, 0.4, 1.0)]
    nothing, some, everything = evaluate(model, _loader(), settings)
    assert nothing.selected == 2 > some.selected > everything.selected
    assert nothing.dropped == some.dropped == everything.dropped == 0
    assert nothing.unprocessed == 0 < some.unprocessed < everything.unprocessed


def test_what_a_trained_model_needs():
    model, loader = dropping(router="threshold", mean_selected_experts=1.5, noise_std=0.0), _loader()
    with torch.no_grad():
        model.train()(loader[0][0])
    model.eval()
    found = evaluate(model, loader, setting_grid([4.0], [2], [True], [1.5, 1.0]))
    assert [each.selected for each in found] == pytest.approx([1.5, 1.0], abs=0.1)
    with pytest.raises(ValueError, match="gate_threshold must be given with mean_selected_experts"):
        evaluate(dropping(), loader, [RoutingSetting(mean_selected_experts=1.5)])


def test_k_is_a_dial_of_a_model_that_has_a_mean():
    model = dropping(router="threshold", mean_selected_experts=1.5)
    two, one = evaluate(model, _loader(), setting_grid([None], [2, 1], [None]))
    assert one.selected == 1 < two.selected
    assert one.flops.total < two.flops.total


def test_flops_are_those_of_the_slots():
    """Experts count at full capacity, which follows the mean."""
    images = torch.randn(8, 1, 16, 16)
    model = dropping(capacity_factor=1.0, router="threshold", mean_selected_experts=2)
    full = count_flops(model, images)
    vmoe_torch.set_routing(model.train(), mean_selected_experts=0.5)
    quarter = count_flops(model, images)
    layer: MoeMlp = model.blocks[0].mlp
    per_row = 4 * layer.fc1.weight.shape[1] * layer.fc1.weight.shape[2]
    for name in full.layers:
        assert full.layers[name] - quarter.layers[name] == pytest.approx(per_row * 17 * 1.5)
