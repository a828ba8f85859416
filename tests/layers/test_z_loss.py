"""The router z-loss against its definition in NumPy, with every router that has logits."""

import numpy as np
import pytest
import torch

import vmoe_torch
from tests.tiny import tiny_model
from vmoe_torch.layers import MoeMlp, router_z_loss
from vmoe_torch.models.ensemble import EnsembleMoeMlp

NO_OTHERS = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}
ROUTERS = (
    {},
    {"capacity_factor": "dropless"},
    {"router": "threshold", "mean_selected_experts": 1.5},
    {"router": "expert_choice"},
    {"expert_hidden": [16, 32, 32, 0]},
)


def _layer(dtype=torch.float64, **kwargs) -> MoeMlp:
    torch.manual_seed(0)
    options = {"num_experts": 4, "group_size": 2, "capacity_multiple_of": 1, "auxiliary_mode": "manual"}
    options |= {**NO_OTHERS, **kwargs}
    layer = MoeMlp(8, 32, dtype=dtype, **options).train()
    torch.nn.init.normal_(layer.router.weight)
    return layer


def _definition(x: torch.Tensor, weight: torch.Tensor) -> float:
    logits = x.detach().double().numpy().reshape(-1, 8) @ weight.detach().double().numpy().T
    return float(np.mean(np.log(np.exp(logits).sum(1)) ** 2))


@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_loss_is_the_definition_s(options):
    # Five images: a smaller last group counts by its tokens. Noise does not count.
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    layer = _layer(router_z_loss_weight=0.5, noise_std=3.0, **options)
    layer(x)
    assert vmoe_torch.auxiliary_loss(layer).item() == pytest.approx(0.5 * _definition(x, layer.router.weight))
    both = _layer(router_z_loss_weight=0.5, noise_std=0.0, **{**options, "importance_loss_weight": 2.0})
    one = _layer(noise_std=0.0, **{**options, "importance_loss_weight": 2.0})
    for each in (both, one):
        each(x)
    rest = vmoe_torch.auxiliary_loss(both) - vmoe_torch.auxiliary_loss(one)
    assert rest.item() == pytest.approx(0.5 * _definition(x, layer.router.weight))


def test_weight_0_and_eval_mode_are_without():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for layer in (_layer(), _layer(router_z_loss_weight=1.0).eval()):
        layer(x)
        assert vmoe_torch.auxiliary_loss(layer) == 0
    assert _layer(router_z_loss_weight=1.0)(x[:0]).shape == (0, 3, 8)


def test_gradient():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router_z_loss, (logits,))
    layer = _layer(router_z_loss_weight=1.0, noise_std=0.0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def loss(x, weight):
        torch.func.functional_call(layer, {"router.weight": weight}, (x,))
        return layer.record.loss

    assert torch.autograd.gradcheck(loss, (x, layer.router.weight))


@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_injected_is_manual(options):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    gradients = []
    for mode in ("manual", "injected"):
        layer = _layer(router_z_loss_weight=0.5, noise_std=0.0, auxiliary_mode=mode, **options)
        loss = 0.0 * layer(x).sum()
        (loss + vmoe_torch.auxiliary_loss(layer) if mode == "manual" else loss).backward()
        gradients.append(layer.router.weight.grad)
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(*gradients)


def test_float32_whatever_the_tokens_are():
    layer = _layer(torch.float32, router_z_loss_weight=1.0)
    x = 100 * torch.randn(4, 3, 8)
    want = _definition(x.bfloat16(), layer.router.weight)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.bfloat16())
    assert layer.record.loss.dtype == torch.float32
    assert vmoe_torch.auxiliary_loss(layer).item() == pytest.approx(want, rel=1e-5)
    # Squares that float16 does not hold.
    assert router_z_loss(torch.full((2, 4), 3e4, dtype=torch.float16)).item() == pytest.approx(9e8, rel=1e-3)


def test_small_logits_are_what_it_leads_to():
    layer = _layer(torch.float32, router_z_loss_weight=0.1, auxiliary_mode="injected")
    x, optimizer = torch.randn(8, 6, 8), torch.optim.SGD(layer.router.parameters(), lr=0.1)
    before = router_z_loss(layer.router(x.flatten(0, 1)))
    for _ in range(20):
        optimizer.zero_grad()
        (0.0 * layer(x).sum()).backward()
        optimizer.step()
    assert router_z_loss(layer.router(x.flatten(0, 1))) < 0.8 * before


def test_models_take_it():
    model = tiny_model(router_z_loss_weight=0.25, auxiliary_mode="manual").train()
    assert [layer.router_z_loss_weight for layer in vmoe_torch.moe_layers(model).values()] == [0.25, 0.25]
    dense = tiny_model(moe_layers=())
    sparse = vmoe_torch.upcycle(dense, (1,), 2, router_z_loss_weight=0.5)
    assert sparse.blocks[1].mlp.router_z_loss_weight == 0.5


def test_an_ensemble_s_is_the_mean_of_its_members():
    weights = {"gshard_loss_weight": 0.0, "size_loss_weight": 0.5, "router_z_loss_weight": 0.5, **NO_OTHERS}
    ensemble = EnsembleMoeMlp(8, ensemble_size=2, num_experts=4, **weights)
    assert [member.router_z_loss_weight for member in ensemble.members] == [0.25, 0.25]
    assert [member.size_loss_weight for member in ensemble.members] == [0.25, 0.25]


def test_a_compiled_step_is_the_eager_one():
    torch._dynamo.reset()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gradients = []
    for compiled in (False, True):
        layer = _layer(router_z_loss_weight=0.1, auxiliary_mode="injected", noise_std=0.0)
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        run(x).square().sum().backward()
        gradients.append(layer.router.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_soft_router_has_none():
    with pytest.raises(ValueError, match=r"router_z_loss_weight must be left out with router='soft', got 0.1"):
        MoeMlp(8, router="soft", group_size="image", router_z_loss_weight=0.1)
