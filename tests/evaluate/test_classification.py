"""Evaluation at many routing settings: accuracy, FLOPs, and a model left as it was."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F

import vmoe_torch
from vmoe_torch.evaluate import RoutingSetting, count_flops, evaluate, setting_grid


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = vmoe_torch.VMoE(
        img_size=16,
        patch_size=4,
        in_chans=1,
        num_classes=6,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        num_experts=4,
        group_size=4,
        capacity_multiple_of=None,
        weight_init="jax",
    )
    torch.nn.init.normal_(model.head.weight)
    return model.train()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.randint(6, (size,), generator=generator))
        for size in (8, 8, 5)
    ]


def routing_of(model):
    return [
        (layer.num_selected_experts, layer.capacity_factor, layer.eval_capacity_factor, layer.batch_priority)
        for layer in vmoe_torch.moe_layers(model).values()
    ]


def test_evaluate_agrees_with_plain_forward(model, batches):
    results = evaluate(model, batches, setting_grid([0.5, 4.0], [1, 2]))
    model.eval()
    for result in results:
        with torch.no_grad(), vmoe_torch.routing(model, **result.setting.changes()):
            logits = torch.cat([model(images) for images, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        assert result.images == 21
        assert result.top1 == (logits.argmax(1) == labels).sum().item() / 21
        assert result.top5 == (logits.topk(5).indices == labels.unsqueeze(1)).any(1).sum().item() / 21
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    # 4.0 with 4 experts holds every token whatever the order; 0.5 does not.
    at = {tuple(result.setting.changes().values()): result for result in results}
    assert at[4.0, 1, True].dropped == 0 == at[4.0, 2, False].unprocessed
    assert at[4.0, 2, True].loss == pytest.approx(at[4.0, 2, False].loss, rel=1e-5)
    assert at[0.5, 1, True].dropped >= 0.4


def test_evaluate_restores_routing_and_modes(model, batches):
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = routing_of(model)
    evaluate(model, batches[:1], setting_grid([0.25], [1]))
    assert routing_of(model) == before
    assert [module.training for module in model.modules()] == modes

    wrong = [(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(RuntimeError):
        evaluate(model, wrong, setting_grid([0.25], [1]))
    assert routing_of(model) == before
    assert [module.training for module in model.modules()] == modes


def test_evaluate_reports_the_rounded_capacity(model, batches):
    # Groups of 4 x 17 tokens: 68 * 2 * 0.1 / 4 = 3.4 slots, rounded up to 4; the last image alone: 0.85, up to 1.
    (result,) = evaluate(model, batches, [RoutingSetting(0.1, 2)])
    slots, choices = 4 * (5 * 4 + 1), 21 * 17 * 2
    assert result.capacity_factor == pytest.approx(slots / choices)
    assert result.dropped >= 1 - slots / choices


def test_evaluate_refuses_bad_input(model, batches):
    with pytest.raises(ValueError, match="settings must hold at least one"):
        evaluate(model, batches, [])
    with pytest.raises(ValueError, match="loader must give at least one image"):
        evaluate(model, [])
    with pytest.raises(ValueError, match=r"num_selected_experts must be in 1..num_experts=4, got 5"):
        evaluate(model, batches, [RoutingSetting(1.0, 5)])
    with pytest.raises(ValueError, match="images must hold at least one"):
        count_flops(model, torch.zeros(0, 1, 16, 16))


def test_flops_fall_with_capacity_and_experts(model, batches):
    images = batches[0][0]
    totals = {}
    for setting in setting_grid([1.0, 0.5, 0.25], [2, 1], [True]):
        with vmoe_torch.routing(model, **setting.changes()):
            totals[setting.num_selected_experts, setting.capacity_factor] = count_flops(model, images).total
    for selected in (1, 2):
        assert totals[selected, 1.0] > totals[selected, 0.5] > totals[selected, 0.25]
    for capacity in (1.0, 0.5, 0.25):
        assert totals[2, capacity] > totals[1, capacity]


def test_flops_count_every_matrix_product(model, batches):
    tokens, width, hidden = 17, 16, 32
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    mlp = 2 * tokens * width * hidden
    outside = 16 * 16 * width + width * 6
    with vmoe_torch.routing(model, capacity_factor=1.0):
        flops = count_flops(model, batches[0][0])
    assert flops.dense == 2 * (outside + 2 * (attention + mlp))
    router = tokens * width * 4
    # 68 tokens per group, two choices, four experts: 34 slots each.
    experts = 4 * 34 * 2 * width * hidden / 4
    assert flops.total == 2 * (outside + 2 * attention + mlp + router + experts)
    assert list(flops.layers.values()) == [2 * (router + experts)]
    assert flops.relative == flops.total / flops.dense


def test_flops_are_counted_on_the_models_device():
    model, images = timm.create_model("test_vmoe", img_size=32), torch.zeros(8, 3, 32, 32)
    here = count_flops(model, images)
    assert dataclasses.replace(here, filled=None) == count_flops(model.to("meta"), images)
