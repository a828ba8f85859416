"""Thresholds of trained models: found on images without training, set, taken back, saved and loaded."""

import copy
import math

import pytest
import torch

import vmoe_torch
from tests.tiny import dropping, grey_images


def test_of_a_trained_v_moe_reaches_the_mean():
    """On a top-experts model, without training: the mean on the images is met, on others roughly."""
    model = dropping(capacity_factor=2.0)
    seen, unseen = grey_images(48).chunk(2)
    for mean in (1.4, 0.7, 2.0):
        vmoe_torch.set_routing(model, mean_selected_experts=mean, data=[seen[:16], (seen[16:], torch.zeros(8))])
        for images, tolerance in ((seen, 0.05), (unseen, 0.15)):
            model(images)
            for stats in vmoe_torch.routing_stats(model).values():
                found = stats["selected"] @ torch.arange(3.0) if mean < 2 else torch.tensor(2.0)
                assert float(found) == pytest.approx(mean, abs=tolerance)
        assert model.blocks[0].mlp.record.groups.capacity == math.ceil(17 * 8 * mean * 2.0 / 4)


def test_threshold_0_undoes_it():
    model, images = dropping(), grey_images()
    want = model(images)
    vmoe_torch.set_routing(model, mean_selected_experts=1.2, data=images)
    assert not torch.equal(model(images), want)
    vmoe_torch.set_routing(model, mean_selected_experts=None, gate_threshold=0.0)
    assert torch.equal(model(images), want)


def test_a_block_undoes_it():
    model, images = dropping(), grey_images()
    want = model(images)
    with vmoe_torch.routing(model, mean_selected_experts=1.2, data=images):
        assert not torch.equal(model(images), want)
    assert torch.equal(model(images), want)


def test_it_travels(tmp_path):
    model, images = dropping(), grey_images()
    vmoe_torch.set_routing(model, mean_selected_experts=1.2, data=images, layers=["blocks.1.mlp"])
    want = model(images)
    other = dropping()
    other.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "x.pt")
    third = dropping()
    third.load_state_dict(torch.load(tmp_path / "x.pt"))
    for each in (other, third, copy.deepcopy(model)):
        assert torch.equal(each(images), want)
    assert vmoe_torch.moe_layers(other)["blocks.1.mlp"].mean_selected_experts == 1.2
    assert vmoe_torch.moe_layers(other)["blocks.0.mlp"].gate_threshold is None


def test_another_mean_of_a_threshold_model_needs_no_data():
    model, images = dropping(router="threshold", mean_selected_experts=1.5, noise_std=0.0), grey_images(16)
    with torch.no_grad():
        model.train()(images)
    model.eval()
    for mean in (1.5, 1.0, 0.6):
        vmoe_torch.set_routing(model, mean_selected_experts=mean)
        model(images)
        stats = vmoe_torch.routing_stats(model)["blocks.0.mlp"]
        assert float(stats["selected"] @ torch.arange(3.0)) == pytest.approx(mean, abs=0.1)
    vmoe_torch.set_routing(model, gate_threshold=0.3)
    assert model.blocks[0].mlp.gate_threshold == 0.3
    # A threshold belongs to the mean it was found for.
    vmoe_torch.set_routing(model, mean_selected_experts=1.0)
    assert model.blocks[0].mlp.gate_threshold is None


@pytest.mark.parametrize("means", [1.5, (0.5, 1.5), 2.0])
def test_a_smaller_k_takes_the_mean_along(means):
    model, images = dropping(router="threshold", mean_selected_experts=means), grey_images()
    first, second = vmoe_torch.moe_layers(model).values()
    with vmoe_torch.routing(model, num_selected_experts=1, layers="blocks.0.mlp"):
        assert first.mean_selected_experts == ((0.5, 1.0) if isinstance(means, tuple) else 1.0)
        assert second.mean_selected_experts == means
        model(images)
        assert (first.record.selected is None, first.record.slots.shape[1]) == (True, 1)
    assert first.mean_selected_experts == means
    vmoe_torch.set_routing(model, num_selected_experts=3)
    assert (first.num_selected_experts, first.mean_selected_experts) == (3, means)
    with pytest.raises(ValueError, match=r"at most num_selected_experts=1, got 1\.2"):
        vmoe_torch.set_routing(model, num_selected_experts=1, mean_selected_experts=1.2)
    with pytest.raises(ValueError, match=r"num_selected_experts must be in 1..num_experts=4, got 0"):
        vmoe_torch.set_routing(model, num_selected_experts=0)
    assert first.mean_selected_experts == means


def test_thresholds_that_let_nothing_through_drop_nothing():
    model = dropping(gate_threshold=1.0)
    model(grey_images())
    for stats in vmoe_torch.routing_stats(model).values():
        assert (stats["dropped"], stats["unprocessed"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": torch.zeros(1, 1, 16, 16)}, "data must come with one number as mean_selected_experts"),
        (
            {"data": torch.zeros(1, 1, 16, 16), "mean_selected_experts": (1, 2)},
            "data must come with one number as mean_selected_experts",
        ),
        (
            {"data": torch.zeros(1, 1, 16, 16), "mean_selected_experts": 1, "gate_threshold": 0.1},
            "data must come with one number as mean_selected_experts, and without gate_threshold",
        ),
        ({"data": [], "mean_selected_experts": 1.2}, "data must hold at least one image, got none"),
        ({"mean_selected_experts": 1.2}, "gate_threshold must be given with mean_selected_experts=1.2 unless"),
        ({"mean_selected_experts": 1.2, "gate_threshold": 2.0}, "gate_threshold must be None or in 0..1, got 2.0"),
        ({"gate_threshold": 0.1, "capacity_factor": -1.0}, "capacity_factor must be above 0, got -1.0"),
    ],
)
def test_errors_change_nothing(changes, message):
    model = dropping()
    before = [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    with pytest.raises(ValueError, match=message):
        vmoe_torch.set_routing(model, **changes)
    assert before == [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    assert all(layer.own_router().selection is None for layer in vmoe_torch.moe_layers(model).values())


def test_a_failing_forward_changes_nothing():
    model = dropping()
    before = [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    with pytest.raises(Exception, match="channels"):
        vmoe_torch.set_routing(model, mean_selected_experts=1.2, data=torch.zeros(2, 3, 16, 16))
    assert before == [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    assert not model.training


def test_an_interrupted_reading_changes_nothing():
    model = dropping()
    before = [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]

    def interrupted():
        yield grey_images()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vmoe_torch.set_routing(model, mean_selected_experts=1.2, data=interrupted())
    assert before == [layer.routing_state() for layer in vmoe_torch.moe_layers(model).values()]
    assert not model.training


def test_expert_choice_has_none():
    model = dropping(router="expert_choice")
    with pytest.raises(ValueError, match=r"routing must be among .* got gate_threshold"):
        vmoe_torch.set_routing(model, gate_threshold=0.1)
