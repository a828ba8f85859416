"""Models with experts of several sizes: nested upcycling, FLOPs, plans, weights that say their sizes, ranks."""

import io

import pytest
import timm
import torch
from torch import nn

import vmoe_torch
from vmoe_torch.checkpoints import upcycle_optimizer
from vmoe_torch.evaluate import count_flops
from vmoe_torch.evaluate.table import as_rows
from vmoe_torch.models.architecture import shape_arguments
from vmoe_torch.planning import PlannedRun, changes_that_fit, forward_flops, plan

SHARES = [1.0, 0.5, 0.0, 0.25]


def _dense() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, img_size=32, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def _model(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "expert_hidden": SHARES}
    return timm.create_model("test_vmoe", **{**options, **kwargs}).eval()


def test_upcycling_slices_by_importance():
    dense = _dense()
    sparse = vmoe_torch.upcycle(dense, (1,), 4, expert_hidden=SHARES, num_selected_experts=1)
    mlp, layer = dense.blocks[1].mlp, sparse.blocks[1].mlp
    assert layer.expert_hidden == (192, 96, 0, 48)
    weight_in, weight_out = mlp.fc1.weight.detach().numpy(), mlp.fc2.weight.detach().numpy()
    importance = (weight_in**2).sum(1) ** 0.5 * (weight_out**2).sum(0) ** 0.5
    order = (-importance).argsort()
    for name, hidden in (("experts_0", 192), ("experts_1", 96), ("experts_3", 48)):
        fc1, fc2 = layer.fc1.get_submodule(name), layer.fc2.get_submodule(name)
        assert (fc1.weight[0].detach().numpy() == weight_in[order[:hidden]]).all()
        assert (fc2.weight[0].detach().numpy() == weight_out[:, order[:hidden]]).all()
        assert torch.equal(fc1.bias[0], mlp.fc1.bias[torch.from_numpy(order[:hidden])])
        assert torch.equal(fc2.bias[0], mlp.fc2.bias)
    spared = sparse.no_weight_decay()
    assert {"blocks.1.mlp.fc1.experts_0.bias", "blocks.1.mlp.fc2.experts_3.bias"} <= spared


def test_noise_of_every_size_is_relative_to_the_dense_weight():
    dense = _dense()
    mlp = dense.blocks[1].mlp
    with torch.no_grad():
        # The first half is all that counts.
        mlp.fc1.weight[mlp.fc1.out_features // 2 :] *= 0.01
    clean, noisy = (
        vmoe_torch.upcycle(dense, (1,), 4, expert_hidden=SHARES, expert_noise=noise).blocks[1].mlp
        for noise in (0.0, 0.5)
    )
    for name in ("fc1", "fc2"):
        std = getattr(mlp, name).weight.std()
        for before, after in zip(getattr(clean, name).linears(), getattr(noisy, name).linears()):
            assert ((after.weight - before.weight).std() / std).item() == pytest.approx(0.5, rel=0.05)


def test_a_whole_expert_is_the_dense_mlp():
    dense, images = _dense(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    options = {"num_selected_experts": 1, "capacity_factor": 8.0, "renormalize_gates": True}
    sparse = vmoe_torch.upcycle(dense, (0, 1), 2, expert_hidden=[0.25, 1.0], **options)
    outputs = []
    for sign in (1.0, -1.0):
        for layer in vmoe_torch.moe_layers(sparse).values():
            # All tokens to the whole expert, then all to the slice.
            layer.own_router().choices = lambda experts, sign=sign: torch.full_like(experts, int(sign > 0))
        outputs.append(sparse(images))
    torch.testing.assert_close(outputs[0], dense(images), rtol=1e-10, atol=1e-10)
    assert (outputs[1] - dense(images)).abs().max() > 1e-3


def test_equal_sizes_upcycle_as_ever():
    dense = _dense()
    states = [
        vmoe_torch.upcycle(dense, (1,), 2, expert_hidden=given).blocks[1].mlp.fc1.state_dict()
        for given in (None, [1.0, 192])
    ]
    assert states[0].keys() == states[1].keys() == {"weight", "bias"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    half = vmoe_torch.upcycle(dense, (1,), 2, expert_hidden=[0.5, 0.5]).blocks[1].mlp
    assert half.fc1.weight.shape == (2, 96, 48)


def test_upcycling_refuses():
    dense = _dense()
    with pytest.raises(ValueError, match="expert_hidden must be at most the dense MLP's 192, got 384"):
        vmoe_torch.upcycle(dense, (1,), 2, expert_hidden=[2.0, 1.0])
    sparse = vmoe_torch.upcycle(dense, (1,), 2, expert_hidden=[0.5, 1.0])
    first, second = (torch.optim.AdamW(model.parameters()) for model in (dense, sparse))
    with pytest.raises(ValueError, match="experts must be of one size to take over an optimizer's moments"):
        upcycle_optimizer(first, dense, second, sparse)


def test_flops_are_the_bound_and_what_was_filled():
    model, images = _model(capacity_factor=2.0), torch.randn(8, 3, 32, 32)
    counted = count_flops(model, images)
    layer = model.blocks[1].mlp
    slots, rows = layer.record.slots, layer.record.groups.rows
    router = 2 * len(slots) * 64 * 4
    assert counted.layers["blocks.1.mlp"] * 8 == router + 4 * 64 * rows * (128 + 64 + 0 + 32)
    tokens = [int(((slots >= 0) & (slots // rows == e)).sum()) for e in range(4)]
    assert min(tokens) > 0
    filled = 4 * 64 * sum(h * n for h, n in zip((128, 64, 0, 32), tokens))
    bound = layer.expert_flops(4 * rows)
    assert (counted.total - counted.filled) * 8 == pytest.approx(bound - filled)
    # The dense counterpart has the MLP that widths are shares of, whatever the experts have.
    dense = count_flops(timm.create_model("test_vmoe", img_size=32, depth=2, moe_layers=()), images)
    assert counted.dense == dense.total == dense.filled
    halves = _model(expert_hidden=[0.5] * 4, capacity_factor=2.0)
    assert count_flops(halves, images).dense == dense.total
    assert forward_flops(model, 8) / 8 == counted.total
    unknown = count_flops(_model(capacity_factor=2.0).to("meta"), images.to("meta"))
    assert (unknown.total, unknown.filled) == (counted.total, None)
    (evaluation,) = vmoe_torch.evaluate.evaluate(model, [(images, torch.zeros(8, dtype=torch.int64))])
    assert as_rows([evaluation])[0]["filled_flops"] == counted.filled
    more = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5)) + 1.0
    batches = [(each, torch.zeros(8, dtype=torch.int64)) for each in (images, more)]
    (evaluation,) = vmoe_torch.evaluate.evaluate(model, batches)
    other = count_flops(model, more).filled
    assert other != counted.filled
    assert evaluation.filled_flops == pytest.approx((counted.filled + other) / 2)


def test_plans_count_what_there_is():
    sizes = {"expert_hidden": [1.0, 0.5, 1.0, 0.5]}
    model = _model(**sizes)
    one = plan(model, PlannedRun(gpus=1, ep=1, batch=8))
    assert one.parameters == 4 * sum(p.numel() for p in model.parameters())
    whole = plan(_model(expert_hidden=None), PlannedRun(gpus=1, ep=1, batch=8))
    assert one.flops_per_step < whole.flops_per_step
    assert one.activations < whole.activations
    assert plan(model, PlannedRun(gpus=2, ep=2, batch=8)).exchange_per_step > 0
    with pytest.raises(ValueError, match=r"ep must divide the number of experts of every size, .* got ep=4 and 2 of"):
        plan(model, PlannedRun(gpus=4, ep=4, batch=8))
    with pytest.raises(ValueError, match="ep must divide num_experts=4, got ep=3"):
        plan(model, PlannedRun(gpus=3, ep=3, batch=9))
    assert all(change.settings.ep <= 2 for _, change in changes_that_fit(model, PlannedRun(1, 1, 8)))


def test_names_and_shapes_say_the_sizes():
    model = _model(expert_hidden=[64, 128, 0, 64])
    plain = dict(model.state_dict())
    found = shape_arguments("test_vmoe", plain)
    assert found["expert_hidden"] == (64, 128, 0, 64)
    assert "expert_hidden" not in shape_arguments("test_vmoe", dict(_model(expert_hidden=None).state_dict()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = _model(expert_hidden=[64, 128, 0, 64], num_classes=1000)
    again.load_state_dict(torch.load(file, weights_only=True))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))
