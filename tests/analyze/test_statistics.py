"""Routing statistics and kept patches against the slots that the layers gave."""

import pytest
import torch

import vmoe_torch
from vmoe_torch.analyze import LayerRouting, collect_routing, kept_choices_per_patch
from vmoe_torch.analyze.statistics import dependence
from vmoe_torch.models.ensemble import VMoEEnsemble


@pytest.fixture
def model():
    torch.manual_seed(1)
    return vmoe_torch.VMoE(
        img_size=(8, 12),
        patch_size=4,
        in_chans=1,
        num_classes=3,
        embed_dim=16,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        num_experts=4,
        group_size=2,
        capacity_factor=0.5,
        capacity_multiple_of=None,
        weight_init="jax",
    ).train()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 1, 8, 12, generator=generator), torch.randint(2, (size,), generator=generator))
        for size in (4, 3)
    ]


def test_collected_counts_are_those_of_the_slots(model, batches):
    found = collect_routing(model, batches, num_classes=3, bins=10)
    assert model.training
    assert list(found) == ["blocks.1.mlp", "blocks.3.mlp"]
    model.eval()
    for name, routing in found.items():
        wanted, kept = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
        places = torch.zeros(2, 3, 4, dtype=torch.int64)
        unprocessed = slots = 0
        for images, labels in batches:
            with torch.no_grad():
                model(images)
            layer = vmoe_torch.moe_layers(model)[name]
            record = layer.record
            # Groups of two images, and of one for what remains.
            slots += 4 * (len(images) // 2 * layer.capacity(14) + len(images) % 2 * layer.capacity(7))
            for token, (experts, found_slots) in enumerate(zip(record.experts.tolist(), record.slots.tolist())):
                label, place = labels[token // 7], token % 7 - 1
                for expert, slot in zip(experts, found_slots):
                    wanted[label, expert] += 1
                    kept[label, expert] += slot >= 0
                    # Token 0 is the class token.
                    if place >= 0:
                        places[place // 3, place % 3, expert] += slot >= 0
                unprocessed += max(found_slots) < 0
        assert torch.equal(routing.wanted, wanted)
        assert torch.equal(routing.kept, kept)
        assert routing.unprocessed == unprocessed > 0
        assert routing.tokens == 7 * 7
        assert torch.equal(routing.positions, places)
        assert routing.slots == slots
        assert routing.capacity_factor == pytest.approx(slots / 98)
        assert routing.demand.tolist() == pytest.approx((4 * wanted.sum(0) / 98).tolist())
        assert routing.gates.shape == (2, 10)
        assert routing.gates.sum(1).tolist() == [49, 49]
        assert routing.dropped == pytest.approx(1 - kept.sum().item() / 98)
        assert routing.load.sum().item() == pytest.approx(1.0)
        # No image shows class 2.
        assert routing.expert_share.sum(1).tolist() == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize("batch_priority", [False, True])
def test_kept_maps_agree_with_slots(model, batches, batch_priority):
    images = batches[0][0]
    with vmoe_torch.routing(model, capacity_factor=0.3, batch_priority=batch_priority):
        maps = kept_choices_per_patch(model, images)
    for name, layer in vmoe_torch.moe_layers(model).items():
        assert maps[name].shape == (4, 2, 3)
        slots = layer.record.slots.view(4, 7, 2)
        for image in range(4):
            for patch in range(6):
                # Token 0 is the class token.
                kept = int((slots[image, 1 + patch] >= 0).sum())
                assert maps[name][image, patch // 3, patch % 3] == kept
        assert 0 < maps[name].sum() < 4 * 6 * 2


def test_vanilla_keeps_the_first_image_of_a_group_before_the_second(model, batches):
    with vmoe_torch.routing(model, capacity_factor=0.3, num_selected_experts=1, batch_priority=False):
        maps = kept_choices_per_patch(model, batches[0][0])
    for kept in maps.values():
        first, second = kept[0::2].sum(), kept[1::2].sum()
        assert first > second


def test_statistics_refuse_models_they_cannot_count(batches):
    dense = vmoe_torch.VMoE(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, moe_layers=())
    with pytest.raises(ValueError, match="model must have at least one MoE layer"):
        collect_routing(dense, batches, 3)
    with pytest.raises(ValueError, match="model must have at least one MoE layer"):
        kept_choices_per_patch(dense, batches[0][0])
    choosing = vmoe_torch.VMoE(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_experts=2, router="expert_choice"
    )
    with pytest.raises(ValueError, match=r"blocks.1.mlp must route by top_experts or threshold, got expert_choice"):
        collect_routing(choosing, batches, 3)
    with pytest.raises(ValueError, match=r"labels must be in 0..1, got 0..2"):
        collect_routing(model_of_two_classes(), [(batches[0][0], torch.tensor([0, 2, 1, 1]))], 2)


def model_of_two_classes():
    return vmoe_torch.VMoE(
        img_size=(8, 12), patch_size=4, in_chans=1, num_classes=2, embed_dim=16, depth=2, num_heads=2, num_experts=2
    )


def test_ensembles_and_models_without_a_class_token_are_counted():
    images, labels = torch.randn(4, 1, 8, 12), torch.tensor([0, 1, 1, 2])
    common = {"img_size": (8, 12), "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    ensemble = VMoEEnsemble(**common, ensemble_size=2, num_experts=4, num_classes=3, moe_layers="every2")
    found = collect_routing(ensemble, [(images, labels)], 3)
    assert list(found) == ["blocks.1.mlp.members.0", "blocks.1.mlp.members.1"]
    for routing in found.values():
        assert routing.wanted.sum(1).tolist() == [14, 28, 14]
        assert routing.positions.shape == (2, 3, 2)
    pooled = vmoe_torch.VMoE(**common, class_token=False, global_pool="avg", num_experts=4, capacity_factor=4.0)
    (routing,) = collect_routing(pooled, [(images, labels)], 3).values()
    assert routing.positions.sum(2).tolist() == [[8] * 3] * 2


def test_dependence_is_what_would_have_to_move():
    assert dependence(torch.tensor([[2, 2], [4, 4], [0, 0]])).tolist() == [0.0, 0.0, 0.0]
    assert dependence(torch.tensor([[4, 0], [0, 4]])).tolist() == [0.5, 0.5]
    assert dependence(torch.tensor([[1, 3], [3, 1]])).tolist() == pytest.approx([0.25, 0.25])


def test_gate_quantiles_are_those_of_the_gates_to_a_bin():
    gates = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 2
    routing = LayerRouting(torch.ones(1, 2), torch.ones(1, 2), torch.stack([gates.histc(50, 0, 1), torch.zeros(50)]))
    first, second = routing.gate_quantiles(0.1, 0.5, 0.9)
    assert (first - gates.quantile(torch.tensor([0.1, 0.5, 0.9]))).abs().max() <= 0.02
    assert second.isnan().all()
