"""Routing statistics and kept patches against the slots that the layers gave."""

import pytest
import torch

import vmoe_torch
from vmoe_torch.analyze import collect_routing, kept_choices_per_patch


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
        unprocessed = 0
        for images, labels in batches:
            with torch.no_grad():
                model(images)
            record = vmoe_torch.moe_layers(model)[name].record
            for token, (experts, slots) in enumerate(zip(record.experts.tolist(), record.slots.tolist())):
                label = labels[token // 7]
                for expert, slot in zip(experts, slots):
                    wanted[label, expert] += 1
                    kept[label, expert] += slot >= 0
                unprocessed += max(slots) < 0
        assert torch.equal(routing.wanted, wanted)
        assert torch.equal(routing.kept, kept)
        assert routing.unprocessed == unprocessed > 0
        assert routing.tokens == 7 * 7
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
    with pytest.raises(ValueError, match=r"blocks.1.mlp must route by top_experts, got expert_choice"):
        collect_routing(choosing, batches, 3)
