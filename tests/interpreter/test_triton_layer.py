"""Routing and experts in Triton, chained as a layer chains them, against the eager twins in the interpreter."""

from functools import partial

import pytest
import torch
from torch import Tensor

import vmoe_kernels as vk
from vmoe_kernels.common.impl import warn_once
from vmoe_kernels.testing import (
    assert_compiles_and_exports,
    assert_matches_eager,
    make_experts,
    poisoned_memory,
)
from vmoe_torch.layers import MoeMlp

# (T, S, D, H, E, K, capacity factor): nothing, one token, a smaller last group, every token of 8 images in one group.
SHAPES = (
    (0, 1, 8, 16, 4, 2, 1.0),
    (1, 1, 1, 3, 1, 1, 1.0),
    (13, 13, 48, 20, 5, 3, 1.05),
    (13, 5, 48, 20, 32, 2, 4.0),
    (7, 7, 768, 20, 3, 2, 1.0),
    (26, 13, 48, 20, 5, 1, 0.2),
    (197 * 8, 197 * 8, 8, 16, 5, 2, 0.5),
)
ODD = SHAPES[2]
# Sums of sums: a few roundings more than one product has.
ULPS = 16


def _inputs(shape) -> dict[str, Tensor]:
    num_tokens, _, width, hidden, num_experts, *_ = shape
    make = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, width, generator=make)
    router = torch.randn(num_experts, width, generator=make) * width**-0.5
    return {"x": x, "router": router, **make_experts((num_experts, width, hidden, width), torch.float32)}


def _layer(x, router, *weights, shape, impl, noise_std=0.0, everything=False) -> Tensor:
    """y (T, D); with `everything`, the sums of the auxiliary losses and the logits behind it, all in one row."""
    _, group, _, _, num_experts, selected, factor = shape
    capacity, rest = (
        vk.compute_capacity(size, num_experts, factor, num_selected_experts=selected)
        for size in (group, x.shape[0] % group or group)
    )
    routing = vk.route(
        x,
        router,
        num_selected_experts=selected,
        capacity=capacity,
        group_size=group,
        last_capacity=rest,
        batch_priority=True,
        noise_std=noise_std,
        seed=torch.tensor(9) if noise_std else None,
        impl=impl,
    )
    rows = vk.rows_per_expert(x.shape[0], group, capacity, rest)
    y = vk.moe_mlp(x, routing.slots, routing.gates, *weights, rows_per_expert=rows, impl=impl)
    if not everything:
        return y
    sums = (routing.importance, routing.mean_gates, routing.load, routing.logits)
    return torch.cat([tensor.flatten().to(y.dtype) for tensor in (y, *sums)])


@pytest.mark.parametrize(("shape", "noise_std"), [*((shape, 1.0) for shape in SHAPES), (ODD, 0.0)], ids=str)
def test_layer_matches_eager(shape, noise_std):
    triton, reference = (
        partial(_layer, shape=shape, impl=impl, noise_std=noise_std, everything=True)
        for impl in ("triton", "reference")
    )
    with poisoned_memory():
        assert_matches_eager(triton, reference, _inputs(shape), ulps=ULPS)


@pytest.mark.parametrize("case", ["one_expert", "ties"])
def test_layer_matches_eager_when_all_tokens_want_the_same(case):
    inputs = _inputs(ODD)
    inputs["x"] = inputs["x"].abs()
    inputs["router"].zero_()
    if case == "one_expert":
        inputs["router"][2] = 1.0
    triton, reference = (partial(_layer, shape=ODD, impl=impl, everything=True) for impl in ("triton", "reference"))
    assert_matches_eager(triton, reference, inputs, ulps=ULPS)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_layer_keeps_a_broken_token_alone(value):
    # With room for all, so that nobody takes the place that the broken token gives up.
    shape = (13, 13, 48, 20, 5, 2, 5.0)
    inputs = _inputs(shape)
    whole = _layer(*inputs.values(), shape=shape, impl="triton")
    inputs["x"][4] = value
    y = _layer(*inputs.values(), shape=shape, impl="triton")
    assert y[4].isnan().all()
    others = torch.arange(13) != 4
    torch.testing.assert_close(y[others], whole[others], rtol=1e-5, atol=1e-6)


def test_layer_compiles_and_exports_as_one_graph():
    inputs = _inputs(ODD)
    op = partial(_layer, shape=ODD, impl="triton", everything=True)
    assert_compiles_and_exports(op, inputs)


def test_layer_runs_under_vmap():
    inputs = _inputs(ODD)
    samples = torch.stack([inputs.pop("x"), torch.randn(13, 48, generator=torch.Generator().manual_seed(4))])
    op = partial(_layer, shape=ODD, impl="triton")
    got = torch.vmap(op, (0, *[None] * len(inputs)))(samples, *inputs.values())
    want = torch.stack([op(x, *inputs.values()) for x in samples])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_second_derivatives_equal_reference():
    inputs = _inputs(ODD)
    results = []
    for impl in ("auto", "reference"):
        leaves = [value.clone().requires_grad_() for value in inputs.values()]
        y = _layer(*leaves, shape=ODD, impl=impl, noise_std=1.0, everything=True)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for name, got, want in zip(inputs, *results):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name


def test_explicit_triton_is_refused_under_forward_mode():
    inputs = _inputs(ODD)
    values = tuple(inputs.values())
    run = partial(_layer, shape=ODD)
    with pytest.raises(ValueError, match=r"^impl must be 'reference' or 'auto' under forward-mode AD .*got 'triton'"):
        torch.func.jvp(partial(run, impl="triton"), values, values)
    got, want = (torch.func.jvp(partial(run, impl=impl), values, values)[1] for impl in ("auto", "reference"))
    assert torch.equal(got, want)
    assert want.abs().max() > 0


@pytest.fixture
def unwarned():
    """No warning was given yet, and none of these tests' is remembered."""
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.mark.parametrize(("num_experts", "selected"), [(257, 2), (16, 9)])
def test_more_than_the_kernels_hold_is_plain_pytorch(unwarned, num_experts, selected):
    inputs = _inputs((13, 13, 48, 20, num_experts, selected, 1.0))
    route = partial(vk.route, inputs["x"], inputs["router"], num_selected_experts=selected, capacity=2)
    with pytest.warns(UserWarning, match=f"at most 256 experts and 8 of them for a token, got {num_experts} and"):
        got = route()
    want = route(impl="reference")
    assert torch.equal(got.slots, want.slots)
    assert torch.equal(got.gates, want.gates)
    spans = vk.assign_dropless_slots(want.experts, num_experts=num_experts).spans
    assert spans[1].sub(spans[0]).sum() == want.experts.numel()
    with pytest.raises(ValueError, match="for the Triton"):
        route(impl="triton")


def test_a_threshold_among_256_experts_is_plain_pytorch_too(unwarned):
    layer = MoeMlp(8, num_experts=256, gate_threshold=0.004).eval()
    with pytest.warns(UserWarning, match=r"got 257 and 2 \(choices below a threshold count as one expert more\)"):
        y = layer(torch.randn(2, 5, 8))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(torch.randn(2, 5, 8)).shape == y.shape
