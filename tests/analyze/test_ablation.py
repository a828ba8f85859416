"""Random routers: uniform, seeded, without a trace afterwards."""

import pytest
import torch

import vmoe_torch
from vmoe_torch.analyze import ablate_routers, random_routers


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = vmoe_torch.VMoE(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=3,
        embed_dim=16,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        num_experts=4,
        group_size=2,
        capacity_multiple_of=1,
        weight_init="jax",
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def images():
    return torch.randn(64, 1, 8, 8)


def _choices(model):
    return [layer.router.choices for layer in vmoe_torch.moe_layers(model).values()]


def _records(model):
    return {name: layer.record for name, layer in vmoe_torch.moe_layers(model).items()}


@torch.no_grad()
@pytest.mark.parametrize("batch_priority", [False, True])
def test_choices_are_uniform_and_the_gates_stay(model, images, batch_priority):
    with vmoe_torch.routing(model, batch_priority=batch_priority, capacity_factor=4.0):
        model(images)
        gates = _records(model)["blocks.1.mlp"].gates
        with random_routers(model, seed=3):
            model(images)
            record = _records(model)["blocks.1.mlp"]
    assert torch.equal(record.gates, gates)
    assert (record.experts[:, 0] != record.experts[:, 1]).all()
    # 320 tokens: each of the 12 ordered pairs of different experts about 27 times.
    pairs = torch.bincount((record.experts[:, 0] * 4 + record.experts[:, 1]).long(), minlength=16)
    assert sorted(pairs.tolist())[:4] == [0, 0, 0, 0]
    assert all(10 < count < 50 for count in sorted(pairs.tolist())[4:])
    # With room for all, every choice is where it said: in its expert's rows.
    assert (record.slots >= 0).all()
    assert torch.equal(record.slots // (64 // 2 * 10), record.experts)


@torch.no_grad()
def test_only_the_named_layers_change_and_nothing_stays(model, images):
    logits = model(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = {name: record.experts for name, record in _records(model).items()}
    with random_routers(model, ["blocks.3.mlp"], seed=5):
        first = model(images)
        found = {name: record.experts for name, record in _records(model).items()}
    assert torch.equal(found["blocks.1.mlp"], experts["blocks.1.mlp"])
    assert not torch.equal(found["blocks.3.mlp"], experts["blocks.3.mlp"])
    assert not torch.equal(first, logits)
    with random_routers(model, ["blocks.3.mlp"], seed=5):
        assert torch.equal(model(images), first)
    with random_routers(model, ["blocks.3.mlp"], seed=6):
        assert not torch.equal(model(images), first)
    with random_routers(model, seed=7):
        outer = _choices(model)
        with random_routers(model, ["blocks.3.mlp"], seed=8):
            assert _choices(model) != outer
        assert _choices(model) == outer
    with pytest.raises(RuntimeError, match="inside"), random_routers(model):
        raise RuntimeError("inside")
    assert torch.equal(model(images), logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_ablation_counts_every_variant(model, images):
    labels = model(images).argmax(1)
    batches = [(images[:40], labels[:40]), (images[40:40], labels[40:40]), (images[40:], labels[40:])]
    model.train()
    found = ablate_routers(model, batches, seed=2)
    assert model.training
    names = ("blocks.1.mlp", "blocks.3.mlp")
    assert [ablation.layers for ablation in found] == [(), (names[0],), (names[1],), names]
    assert found[0].top1 == 1.0
    assert all(ablation.images == 64 for ablation in found)
    assert min(ablation.top1 for ablation in found) < 1.0
    model.eval()
    right, loss = 0, 0.0
    for batch, (part, wanted) in enumerate((batches[0], batches[2])):
        # The empty batch has a number, too.
        with random_routers(model, names, seed=2 + (0, 2)[batch]):
            logits = model(part)
        right += int((logits.argmax(1) == wanted).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    assert found[3].top1 == right / 64
    assert found[3].loss == pytest.approx(loss / 64)
    assert ablate_routers(model, batches, seed=2) == found


def test_one_layer_is_not_ablated_twice(images):
    model = vmoe_torch.VMoE(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2, num_experts=4
    )
    found = ablate_routers(model, [(images, torch.zeros(64, dtype=torch.int64))])
    assert [ablation.layers for ablation in found] == [(), ("blocks.1.mlp",)]


def test_what_cannot_be_ablated_is_refused(model, images):
    with (
        pytest.raises(ValueError, match=r"layers must be among blocks.1.mlp, blocks.3.mlp, got blocks.0.mlp"),
        random_routers(model, ["blocks.0.mlp"]),
    ):
        pass
    with pytest.raises(ValueError, match="loader must give at least one image, got none"):
        ablate_routers(model, [])
    dense = vmoe_torch.VMoE(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, moe_layers=())
    with pytest.raises(ValueError, match="model must have at least one MoE layer"), random_routers(dense):
        pass
