"""set_budget: keeps the budget, is no worse than any one setting for all layers, says what it costs, goes back."""

import json

import pytest
import timm
import torch
from torch import nn

import vmoe_torch
from vmoe_torch.budget import LayerSetting
from vmoe_torch.budget.cost import LatencyCost
from vmoe_torch.budget.settings import assigned, current_settings
from vmoe_torch.evaluate import count_flops

SETTINGS = [LayerSetting(2, 1.05), LayerSetting(2, 0.5), LayerSetting(1, 0.75), LayerSetting(1, 0.3)]


@pytest.fixture
def guarded(fitted):
    """The fitted model, whose routing comes back after the test."""
    with vmoe_torch.routing(fitted[0]):
        yield fitted


@pytest.fixture(scope="module")
def budget(fitted):
    """A budget of 0.8 of the FLOPs."""
    model, batches = fitted
    with vmoe_torch.routing(model):
        return vmoe_torch.set_budget(model, flops=0.8, data=batches, settings=SETTINGS)


@pytest.mark.parametrize(("share", "labelled"), [(1.0, True), (0.9, False)])
def test_budget_is_kept_and_nothing_alike_is_better(guarded, share, labelled):
    model, batches = guarded
    data = batches if labelled else [images for images, _ in batches]
    before = count_flops(model, batches[0][0])
    budget = vmoe_torch.set_budget(model, flops=share, data=data, settings=SETTINGS, rounds=1)
    now = count_flops(model, batches[0][0])
    assert budget.chosen.cost == now.total <= share * before.total == budget.limit
    assert budget.present.cost == before.total
    # FLOPs of layers add up exactly.
    assert all(each.predicted_cost == pytest.approx(each.cost, rel=1e-12) for each in budget.candidates)
    assert current_settings(model) == budget.chosen.settings
    alike = [each for each in budget.candidates if each.alike and each.cost <= budget.limit]
    assert budget.chosen.loss <= min(each.loss for each in alike) == budget.best_global().loss
    assert {each.name for each in budget.candidates} >= {"present", *(f"all layers {s}" for s in SETTINGS)}
    assert budget.labelled == labelled
    assert budget.images == 64


def test_layers_are_set_apart(budget):
    assert not budget.chosen.alike
    assert budget.chosen.loss < budget.best_global().loss
    # Losses need not add up; here they nearly do.
    assert budget.chosen.predicted_loss == pytest.approx(budget.chosen.loss, abs=0.05)


def test_prediction_of_one_layer_is_exact():
    """With a single layer there is nothing to add up."""
    model = timm.create_model("test_vmoe", img_size=16, patch_size=8, moe_layers=[0], num_classes=3).eval()
    nn.init.normal_(model.head.weight)
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 3)]
    budget = vmoe_torch.set_budget(model, flops=1.0, data=data, settings=SETTINGS, rounds=1)
    for each in budget.candidates:
        assert each.predicted_loss == pytest.approx(each.loss, abs=1e-6)


def test_way_there_and_back(guarded, budget):
    model, _ = guarded
    before = current_settings(model)
    budget.apply(model)
    assert current_settings(model) == budget.chosen.settings != before
    # For training the capacity stays.
    assert {layer.capacity_factor for layer in vmoe_torch.moe_layers(model).values()} == {1.05}
    budget.revert(model)
    assert current_settings(model) == before


def test_text_and_json(guarded, budget):
    model, batches = guarded
    text = str(budget)
    for part in ("MFLOPs per image, 0.8 of the present cost", "64 calibration images", "blocks.3.mlp", "top-1 %"):
        assert part in text
    assert "agreement %" not in text
    assert len({len(line) for line in text.splitlines()[2:8]}) == 1
    kept = json.loads(json.dumps(budget.as_dict()))
    assert kept["chosen"]["settings"]["blocks.0.mlp"].keys() == {
        "num_selected_experts",
        "eval_capacity_factor",
        "batch_priority",
    }
    unlabelled = vmoe_torch.set_budget(model, flops=1.0, data=[batches[0][0]], settings=SETTINGS[:1], rounds=1)
    assert "agreement %" in str(unlabelled)
    # One tensor is a batch.
    whole = vmoe_torch.set_budget(model, flops=1.0, data=batches[0][0], settings=SETTINGS[:1], rounds=1)
    assert whole.as_dict() == unlabelled.as_dict()


def test_latency_budget_is_kept(guarded, monkeypatch):
    """A clock that counts the slots of the layers, so that time is known: 2 per slot, 1000 for the rest."""
    model, batches = guarded

    def seconds(self, settings, run):
        layers = vmoe_torch.moe_layers(self.model)
        with assigned(self.model, settings):
            run()
            group = 8 * 16
            if len(settings) == 1 and len(layers) > 1:
                return float(2 * sum(layers[name].capacity(group) for name in settings))
            # The whole model is a little slower than its parts.
            return 1000.0 + 2.2 * sum(layer.capacity(group) for layer in layers.values())

    monkeypatch.setattr(LatencyCost, "_seconds", seconds)
    budget = vmoe_torch.set_budget(model, latency=0.8, data=batches, settings=SETTINGS, rounds=1)
    assert budget.unit == "seconds"
    assert budget.chosen.cost <= budget.limit == pytest.approx(0.8 * budget.present.cost)
    assert budget.chosen.loss <= budget.best_global().loss
    assert "ms per image" in str(budget)


def test_latency_is_measured(guarded):
    model, batches = guarded
    budget = vmoe_torch.set_budget(model, latency=5.0, data=[batches[0]], settings=SETTINGS[:2], rounds=1)
    assert 0 < budget.present.cost < 1
    assert all(each.cost > 0 and each.predicted_cost > 0 for each in budget.candidates)


def test_budget_that_nothing_keeps_names_the_least(guarded):
    model, batches = guarded
    before = current_settings(model)
    with pytest.raises(ValueError, match=r"flops must be at least 0\.\d{4}, the share of the cheapest setting") as info:
        vmoe_torch.set_budget(model, flops=0.01, data=batches, settings=SETTINGS[2:])
    assert current_settings(model) == before
    least = float(str(info.value).split("at least ")[1].split(",")[0])
    with vmoe_torch.routing(model, num_selected_experts=1, capacity_factor=0.3, batch_priority=True):
        cheapest = count_flops(model, batches[0][0]).total
    assert least == pytest.approx(cheapest / count_flops(model, batches[0][0]).total, abs=1e-4)
    vmoe_torch.set_budget(model, flops=least, data=batches, settings=SETTINGS[2:], rounds=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "one of flops and latency must be given"),
        ({"flops": 0.8, "latency": 0.8}, "one of flops and latency must be given"),
        ({"flops": 0.0}, "flops must be above 0, got 0.0"),
        ({"latency": -1.0}, "latency must be above 0, got -1.0"),
        ({"flops": 80}, "flops must be a share of the present cost, at most 1 as 0.8 is, got 80"),
        ({"flops": "a"}, "flops must be above 0, got 'a'"),
        ({"flops": 0.8, "rounds": 0}, "rounds must be at least 1, got 0"),
        ({"flops": 0.8, "rounds": 1.5}, r"rounds must be a whole number, got 1\.5"),
        ({"flops": 0.8, "settings": []}, "settings must hold at least one LayerSetting, got none"),
        ({"flops": 0.8, "settings": [LayerSetting(9, 1.0)]}, "num_selected_experts must be in 1..num_experts=4, got 9"),
    ],
)
def test_what_is_wrong_is_named(guarded, changes, message):
    model, batches = guarded
    before = current_settings(model)
    with pytest.raises(ValueError, match=message):
        vmoe_torch.set_budget(model, data=batches, **changes)
    assert current_settings(model) == before


def test_models_without_such_layers_are_named(fitted):
    with pytest.raises(ValueError, match="at least one MoE layer, got Linear without any"):
        vmoe_torch.set_budget(nn.Linear(2, 2), flops=0.8, data=[torch.zeros(1, 2)])
    layer = next(iter(vmoe_torch.moe_layers(fitted[0]).values()))
    layer.router_type = "expert_choice"
    try:
        with pytest.raises(
            ValueError, match=r"must route by top_experts or threshold, got expert_choice in blocks\.0\.mlp"
        ):
            vmoe_torch.set_budget(fitted[0], flops=0.8, data=fitted[1])
    finally:
        layer.router_type = "top_experts"
