"""A layer and a whole model under forward-mode AD and torch.func: right, or refused with the way out."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from tests.conftest import relative_error
from vmoe_kernels.common.impl import use_reference
from vmoe_torch import auxiliary_loss
from vmoe_torch.layers import MoeMlp, inject_auxiliary_loss

WAY_OUT = "auxiliary_mode must be 'manual' in training .*, got 'injected'"


@pytest.fixture
def unfused():
    """PyTorch's fused attention has neither forward-mode AD nor a second derivative on the CPU."""
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(bool(before))


def _model(**kwargs) -> nn.Module:
    model = timm.create_model("test_vmoe", img_size=32, num_classes=3, depth=2, **kwargs).double()
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("options", [{}, {"router": "expert_choice", "eval_capacity_factor": 0.5}])
def test_model_jvp_equals_finite_differences(options, unfused):
    model = _model(**options).eval()
    x, v = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64).unbind()
    _, got = jvp(model, (x,), (v,))
    step = 1e-6
    with torch.no_grad():
        want = (model(x + step * v) - model(x - step * v)) / (2 * step)
    assert relative_error(got, want) <= 1e-6


def test_per_sample_gradients_add_up(unfused):
    model = _model(group_size="image").eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        assert relative_error(got[name].sum(0), parameter.grad) <= 1e-9, name


def test_gradient_penalty_equals_reference(unfused):
    results = []
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        model = _model(impl=impl, auxiliary_mode="manual", noise_std=0.0).train()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert results[0]["blocks.1.mlp.router.weight"].abs().max() > 0
    for name, got in results[0].items():
        if results[1][name] is not None:
            assert relative_error(got, results[1][name]) <= 1e-9, name


def test_training_with_an_injected_loss_names_the_way_out():
    layer = MoeMlp(8, num_experts=4, noise_std=0.0).train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    with pytest.raises(ValueError, match=WAY_OUT):
        grad(lambda x: layer(x).sum())(x)
    with pytest.raises(ValueError, match=WAY_OUT):
        layer(x).sum().backward(create_graph=True)
    gates, loss = torch.rand(5, 2), torch.rand(())
    with pytest.raises(ValueError, match=WAY_OUT):
        jvp(inject_auxiliary_loss, (gates, loss), (gates, loss))
    # An injected loss is no part of the output: forward mode, which injects nothing, has the output's derivative.
    torch.testing.assert_close(jvp(layer, (x,), (x,))[1], jvp(MoeMlp.eval(layer), (x,), (x,))[1])


def test_gradient_penalty_keeps_an_injected_loss(unfused):
    results = []
    for mode in ("injected", "manual"):
        torch.manual_seed(0)
        model = _model(auxiliary_mode=mode, noise_std=0.0).train()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        loss = model(x).square().sum()
        # It trains no router, so nothing is injected here and the loss stays for the backward below.
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        total = loss + gradient.square().sum()
        (total if mode == "injected" else total + auxiliary_loss(model)).backward()
        results.append(model.blocks[1].mlp.router.weight.grad)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_training_with_a_manual_loss_can_be_differentiated_twice():
    layer = MoeMlp(8, num_experts=4, auxiliary_mode="manual").train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(x).sum() + layer.record.loss), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.abs().max() > 0


def test_explicit_triton_is_refused_under_a_transform():
    def asked(x):
        use_reference("triton", x)
        return x

    with pytest.raises(ValueError, match=r"impl must be 'reference' or 'auto' under forward-mode AD .*, got 'triton'"):
        jvp(asked, (torch.ones(1),), (torch.ones(1),))
