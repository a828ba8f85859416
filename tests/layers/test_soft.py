"""Soft MoE against its definition in float64: what every slot takes of every token, and every token of every slot."""

import copy
import pickle
from math import erf

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import vmoe_torch
from tests.conftest import relative_error
from vmoe_torch.layers import MoeMlp, Routed

D, H, E, P = 6, 5, 4, 3


def _layer(**changes) -> MoeMlp:
    """In float64, of weights that hide nothing."""
    options = {"num_experts": E, "slots_per_expert": P, "router": "soft", **changes}
    layer = MoeMlp(D, H, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.router.scale.fill_(1.7)
    return layer


def _unit(x, axis):
    return x / np.sqrt((x**2).sum(axis, keepdims=True) + 1e-6)


def _softmax(x, axes):
    x = np.exp(x - x.max(axes, keepdims=True))
    return x / x.sum(axes, keepdims=True)


def _by_definition(layer, x):
    """(B, L, D) to (B, L, D), image by image, expert by expert, slot by slot."""
    value = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    mu = _unit(value["router.mu"], 0)
    experts, slots = mu.shape[1:]
    y = np.zeros_like(x)
    for image, tokens in enumerate(x):
        logits = value["router.scale"] * np.einsum("md,dep->mep", _unit(tokens, 1), mu)
        dispatch, combine = _softmax(logits, 0), _softmax(logits, (1, 2))
        for e in range(experts):
            for p in range(slots):
                hidden = value["fc1.weight"][e] @ (dispatch[:, e, p] @ tokens) + value["fc1.bias"][e]
                hidden = hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2
                out = value["fc2.weight"][e] @ hidden + value["fc2.bias"][e]
                y[image] += combine[:, e, p, None] * out
    return y


# More tokens than slots, and fewer: the scale goes into one or the other.
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("training", [False, True])
def test_layer_equals_definition(tokens, training):
    layer = _layer().train(training)
    x = torch.randn(3, tokens, D, dtype=torch.float64)
    assert relative_error(layer(x), _by_definition(layer, x.numpy())) <= 1e-12
    assert layer.record.groups.rows == 3 * P


def test_router_gives_the_shares():
    layer, x = _layer().eval(), torch.randn(2, 7, D, dtype=torch.float64)
    routed = layer.router(x.view(-1, D), layer.groups(14, 7))
    logits = layer.router(x)
    assert logits.shape == (2, 7, E, P)
    want = 1.7 * np.einsum("bmd,dep->bmep", _unit(x.numpy(), 2), _unit(layer.router.mu.detach().numpy(), 0))
    assert relative_error(logits, want) <= 1e-12
    assert relative_error(routed.mix, _softmax(want, 1).reshape(2, 7, E * P)) <= 1e-12
    assert relative_error(routed.gates, _softmax(want, (2, 3)).reshape(14, E * P)) <= 1e-12
    assert relative_error(routed.logits, want.reshape(14, E * P)) <= 1e-12
    with pytest.raises(ValueError, match=rf"x must be \(\.\.\., {D}\), got \(2, 7, 5\)"):
        layer.router(x[..., :5])


def test_one_slot_of_one_expert_is_a_dense_mlp_on_the_mixture():
    """Combine weights are 1: every token of an image gets the same."""
    layer, x = _layer(num_experts=1, slots_per_expert=1).eval(), torch.randn(2, 9, D, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, y[:, :1].expand_as(y))


def test_fresh_router_is_the_originals():
    layer = MoeMlp(256, num_experts=32, slots_per_expert=4, router="soft")
    mu, scale = layer.router.mu, layer.router.scale
    assert (mu.shape, scale.shape, scale.item()) == ((256, 32, 4), (), 1.0)
    assert mu.std().item() == pytest.approx((256 * 32) ** -0.5, rel=0.02)
    # Truncated at two standard deviations of the normal that it is cut from.
    assert mu.abs().max() <= 2 / 0.87962566 * (256 * 32) ** -0.5
    assert (layer.noise_std, layer.slots_per_expert) == (0.0, 4)
    assert MoeMlp(8, num_experts=4).noise_std == 1.0
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.fill_(torch.nan)
    layer.router.reset_parameters()
    assert layer.router.scale == 1
    assert layer.router.mu.isfinite().all()


@pytest.mark.parametrize(("tokens", "factor", "slots"), [(16, 1.0, 4), (10, 1.0, 2), (14, 1.0, 4), (16, 0.5, 2)])
def test_slots_of_a_capacity_factor(tokens, factor, slots):
    """Rounded half to even, as Python does: 2.5 to 2, 3.5 to 4."""
    layer = MoeMlp(D, num_experts=4, router="soft", capacity_factor=factor)
    assert layer.capacity(tokens) == slots
    pickled = pickle.loads(pickle.dumps(layer))
    y = layer(torch.randn(2, tokens, D))
    assert layer.router.mu.shape == (D, 4, slots)
    assert layer.router.slots_per_expert == slots
    # Once they are there, they stay.
    assert layer(torch.randn(2, 3 * tokens, D)).shape == (2, 3 * tokens, D)
    assert layer.router.mu.shape == (D, 4, slots)
    other = copy.deepcopy(pickled)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.router.mu, layer.router.mu)
    assert y.shape == (2, tokens, D)


def test_too_few_tokens_for_a_slot():
    with pytest.raises(ValueError, match="capacity"):
        MoeMlp(D, num_experts=4, router="soft", capacity_factor=0.1)(torch.randn(2, 5, D))


def test_gradients():
    layer = _layer()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def forward(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))


def test_an_image_is_its_own():
    layer = _layer()
    x = torch.randn(4, 9, D, dtype=torch.float64)
    want = layer(x)
    torch.testing.assert_close(torch.cat([layer(image[None]) for image in x]), want, rtol=0, atol=1e-14)
    x[1:] = torch.nan
    torch.testing.assert_close(layer(x)[:1], want[:1], rtol=0, atol=1e-14)


def test_empty_batch():
    layer = _layer()
    assert layer(torch.zeros(0, 7, D, dtype=torch.float64)).shape == (0, 7, D)


def test_noise_is_not_divided_by_the_experts():
    layer = _layer(noise_std=0.5)
    layer.router.scale.data.zero_()
    x = torch.randn(50, 40, D, dtype=torch.float64)
    layer(x)
    # Without signal, logits are noise: what softmax leaves of their logarithms but a constant.
    logs = layer.record.gates.log()
    assert (logs - logs.mean(1, keepdim=True)).std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(layer.eval()(x), layer(x))
    assert torch.equal(layer.record.gates, torch.full_like(logs, 1 / (E * P)))


def test_there_is_no_auxiliary_loss_and_nothing_is_dropped():
    layer = _layer(importance_loss_weight=1.0, load_loss_weight=1.0, gshard_loss_weight=1.0)
    model = nn.Sequential(layer)
    layer(torch.randn(2, 7, D, dtype=torch.float64))
    assert vmoe_torch.auxiliary_loss(model) == 0
    stats = vmoe_torch.routing_stats(model)["0"]
    assert set(stats) == {"load", "unprocessed", "gates"}
    torch.testing.assert_close(stats["load"], torch.full((E,), 1 / E))
    assert stats["unprocessed"] == 0
    assert stats["gates"].shape == (E * P,)
    assert stats["gates"].sum().item() == pytest.approx(1.0)


LEFT_OUT = {
    "num_selected_experts": 1,
    "eval_capacity_factor": 2.0,
    "batch_priority": False,
    "priority": "sum",
    "capacity_multiple_of": 8,
    "renormalize_gates": True,
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_does_not_apply_is_an_error(name):
    with pytest.raises(ValueError, match=rf"^{name} must be left out with router='soft', got {LEFT_OUT[name]!r}"):
        _layer(**{name: LEFT_OUT[name]})


def test_other_mistakes():
    with pytest.raises(ValueError, match=r"^capacity_factor must be left out with router='soft' and slots_per_expert"):
        _layer(capacity_factor=2.0)
    for value in (-1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=r"^slots_per_expert must be None or at least 0, got "):
            _layer(slots_per_expert=value)
    for router in ("top_experts", "expert_choice"):
        with pytest.raises(ValueError, match=r"^slots_per_expert must be None unless router is 'soft', got 2"):
            MoeMlp(D, num_experts=4, router=router, slots_per_expert=2)
    for group_size in (2, "batch"):
        with pytest.raises(ValueError, match=r"^group_size must be 'image' with router='soft', got "):
            _layer(group_size=group_size)


@pytest.mark.parametrize(
    "changes",
    [{"capacity_factor": 0.5}, {"num_selected_experts": 1}, {"batch_priority": True}, {"eval_capacity_factor": 1.0}],
)
def test_set_routing_says_what_does_not_apply(changes):
    model = nn.Sequential(_layer())
    with pytest.raises(ValueError, match=r"in this layer \(capacity, K and priority do not apply: .*\), got "):
        vmoe_torch.set_routing(model, **changes)


def test_set_routing_keeps_the_group():
    model = nn.Sequential(_layer())
    vmoe_torch.set_routing(model, group_size="image")
    with pytest.raises(ValueError, match=r"^group_size must be 'image' with router='soft', got 8"):
        vmoe_torch.set_routing(model, group_size=8)
    assert model[0].group_size == 1


def test_state_dict_and_copies():
    layer, x = _layer().eval(), torch.randn(2, 7, D, dtype=torch.float64)
    assert set(layer.state_dict()) == {
        "router.mu",
        "router.scale",
        *(f"fc{i}.{n}" for i in "12" for n in ("weight", "bias")),
    }
    other = _layer().eval()
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_compiled_and_exported():
    layer, x = _layer().eval(), torch.randn(3, 7, D, dtype=torch.float64)
    want = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), want)
    batch = torch.export.Dim("batch", min=1, max=9)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:2]), want[:2])


def test_per_sample_gradients_add_up():
    layer, x = _layer(), torch.randn(3, 5, D, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, image):
        return functional_call(layer, parameters, (image[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        assert relative_error(got[name].sum(0), parameter.grad) <= 1e-9, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    """Shares in float32, mixtures in 16 bits: autocast, and a layer of 16 bits."""
    layer, x = _layer().float(), torch.randn(3, 7, D)
    want = layer(x).double()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert layer.record.gates.dtype == torch.float32
    # Some ten roundings of sums of tens of terms.
    budget = 16 * torch.finfo(dtype).eps
    assert relative_error(y, want) <= budget
    narrow = copy.deepcopy(layer).to(dtype)
    assert relative_error(narrow(x.to(dtype)), want) <= 2 * budget


def test_rounded_rows():
    layer, x = _layer(), torch.randn(3, 7, D, dtype=torch.float64)
    rounded = _layer(dispatch_dtype="bfloat16")
    rounded.load_state_dict(layer.state_dict())
    assert 1e-6 < relative_error(rounded(x), layer(x)) <= 16 * torch.finfo(torch.bfloat16).eps


def test_a_hook_may_change_the_shares():
    """Here each slot takes one token: a plain tuple of the same values."""
    layer, x = _layer(num_experts=4, slots_per_expert=2).eval(), torch.randn(2, 8, D, dtype=torch.float64)

    def one_each(_module, _inputs, routed):
        return tuple(routed._replace(mix=torch.eye(8, dtype=torch.float64).expand(2, 8, 8)))

    handle = layer.router.register_forward_hook(one_each)
    got = layer(x)
    handle.remove()
    routed = layer.router(x.view(-1, D), layer.groups(16, 8))
    rows = x.view(2, 4, 2, D).transpose(0, 1).flatten(1, 2)
    out = layer.fc2(nn.functional.gelu(layer.fc1(rows))).unflatten(1, (2, 2)).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(got, routed.gates.view(2, 8, 8) @ out)
    assert Routed._field_defaults == {"spans": None, "mix": None, "inverse": None}


def test_a_scripted_layer_refuses():
    with pytest.raises(RuntimeError, match="a scripted MoeMlp must route by top_experts or threshold, got soft"):
        torch.jit.script(torch.nn.Sequential(_layer().eval()))


def test_meta_device():
    layer = MoeMlp(D, H, num_experts=E, slots_per_expert=P, router="soft", device="meta")
    assert layer(torch.zeros(2, 7, D, device="meta")).shape == (2, 7, D)
    layer.to_empty(device="cpu")
    for module in (layer.router, layer.fc1, layer.fc2):
        module.reset_parameters()
    assert layer(torch.randn(2, 7, D)).isfinite().all()
