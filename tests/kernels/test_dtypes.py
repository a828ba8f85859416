"""16-bit tensors on the CPU: outputs and every gradient at most twice as far from float64 as the eager twins are."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_kernels as vk
from vmoe_kernels.experts import cpu
from vmoe_kernels.experts.activations import FORWARD, activate
from vmoe_kernels.experts.types import Activation, ExpertWeights
from vmoe_kernels.testing import assert_matches_eager, assert_within_budget, make_experts, make_routed

NARROW = (torch.float16, torch.bfloat16)
# E, D, H, O; rows of an expert; tokens and choices.
SHAPE, ROWS, T, K = (4, 24, 33, 20), 60, 90, 2
# Keeps sums of huge activations in float16's range; a power of two, so that nothing is rounded.
SMALL = 2.0**-8


def _experts(dtype: torch.dtype, scale: float) -> dict[str, torch.Tensor]:
    """Pre-activations of up to `scale`, and outputs of about 1."""
    weights = make_experts(SHAPE, dtype)
    make = torch.Generator().manual_seed(4)
    spread = torch.linspace(-1, 1, SHAPE[0] * SHAPE[2])[torch.randperm(SHAPE[0] * SHAPE[2], generator=make)]
    weights["fc1_bias"] = (spread.view(SHAPE[0], SHAPE[2]) * scale).to(dtype)
    weights["fc2_weight"] = (weights["fc2_weight"].float() / max(scale / 10, 1.0)).to(dtype)
    return weights


@pytest.mark.parametrize("scale", [1.0, 118.0, 4e4])
@pytest.mark.parametrize("activation", FORWARD)
@pytest.mark.parametrize("dtype", NARROW)
def test_experts_are_as_exact_as_eager(dtype, activation, scale):
    make = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE[0], ROWS, SHAPE[1], generator=make).to(dtype)

    def run(impl, drop, x, *weights):
        out = vk.expert_mlp(x, *weights, activation=activation, drop=drop, seed=torch.tensor(2), impl=impl)
        return out * SMALL

    for drop in (0.0, 0.3):
        ops = (partial(run, impl, drop) for impl in ("auto", "reference"))
        assert_matches_eager(*ops, {"x": x, **_experts(dtype, scale)}, ulps=2)


@pytest.mark.parametrize("scale", [1.0, 118.0, 4e4])
@pytest.mark.parametrize("activation", FORWARD)
@pytest.mark.parametrize("dtype", NARROW)
def test_layer_is_as_exact_as_eager(dtype, activation, scale):
    make = torch.Generator().manual_seed(1)
    rows = torch.randperm(SHAPE[0] * ROWS, generator=make)[: T * K].view(T, K)
    slots = torch.where(torch.rand(T, K, generator=make) < 0.1, -1, rows).to(torch.int32)
    inputs = {"x": torch.randn(T, SHAPE[1], generator=make).to(dtype), "gates": torch.rand(T, K, generator=make)}

    def run(impl, drop, x, gates, *weights):
        options = {"rows_per_expert": ROWS, "activation": activation, "drop": drop, "seed": torch.tensor(2)}
        return vk.moe_mlp(x, slots, gates, *weights, **options, impl=impl) * SMALL

    for drop in (0.0, 0.3):
        ops = (partial(run, impl, drop) for impl in ("auto", "reference"))
        assert_matches_eager(*ops, {**inputs, **_experts(dtype, scale)}, ulps=2)


@pytest.mark.parametrize("dtype", NARROW)
def test_many_blocks_of_rows_round_once(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK_FLOATS", 4 * SHAPE[2])
    test_experts_are_as_exact_as_eager(dtype, "gelu_tanh", 1.0)
    test_layer_is_as_exact_as_eager(dtype, "gelu_tanh", 1.0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_experts_are_as_exact_whatever_the_cpu_multiplies(dtype, fast, monkeypatch):
    monkeypatch.setattr(cpu, "has_products", lambda dtype: fast)
    test_experts_are_as_exact_as_eager(dtype, "gelu_tanh", 1.0)
    test_layer_is_as_exact_as_eager(dtype, "gelu_tanh", 1.0)


class _Products(TorchDispatchMode):
    """Types of the factors of every product."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.update(factor.dtype for factor in args[-2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_every_product_is_in_a_type_that_the_cpu_multiplies(dtype, fast, monkeypatch):
    monkeypatch.setattr(cpu, "has_products", lambda dtype: fast)
    weights, activation = ExpertWeights(*_experts(dtype, 1.0).values()), Activation("gelu_tanh", 0.0, None)
    x, d_out = torch.randn(ROWS, SHAPE[1]).to(dtype), torch.randn(ROWS, SHAPE[3]).to(dtype)
    pre, out = x.new_empty(SHAPE[0], ROWS, SHAPE[2]), torch.empty_like(d_out)
    with _Products() as products:
        cpu.ExpertOutputs(weights, activation, ROWS, pre).fill(out, 1, slice(0, ROWS), x, None)
        cpu.ExpertGradients(weights, activation, pre).add(1, slice(0, ROWS), x, d_out, None)
    assert products.seen == {dtype if fast else torch.float32: 2 * 6}


def test_this_cpu_has_products_of_float32():
    assert cpu.has_products(torch.float32)
    assert cpu.has_products(torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_makes_four_products_of_each_expert(dtype):
    rows = torch.arange(SHAPE[0] * ROWS)[: T * K].view(T, K).to(torch.int32)
    x, gates = torch.randn(T, SHAPE[1], dtype=dtype, requires_grad=True), torch.rand(T, K, requires_grad=True)
    weights = [each.requires_grad_() for each in _experts(dtype, 1.0).values()]
    y = vk.moe_mlp(x, rows, gates, *weights, rows_per_expert=ROWS)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        y.sum().backward()
    filled = T * K // ROWS
    names = Counter(event.name for event in seen.events())
    # Beside the four, none that makes the expert's output again.
    assert (names["aten::mm"], names["aten::addmm"]) == (4 * filled, 0)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_dispatch_combine_and_router_are_as_exact_as_eager(dtype):
    routed = make_routed("random", (67, 4, 5, 41, 8), dtype)
    slots, rows = routed["slots"], routed["buffer"].shape[0]
    buffer = routed["buffer"].nan_to_num()
    options = {"num_selected_experts": 2, "group_size": 20, "noise_std": 1.0, "seed": torch.tensor(3)}
    for scale in (1.0, 1e-3, 1e4):
        x = (routed["x"] * scale / routed["x"].abs().max()).to(dtype)
        assert_matches_eager(
            lambda x: vk.dispatch(x, slots, rows), lambda x: vk.dispatch_reference(x, slots, rows), {"x": x}
        )
        assert_matches_eager(
            lambda buffer, gates: vk.combine(buffer, slots, gates),
            lambda buffer, gates: vk.combine_reference(buffer, slots, gates),
            {"buffer": (buffer * scale / 4).to(dtype), "gates": routed["gates"].to(dtype)},
        )
        weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).div(scale).to(dtype)
        for name in ("gates", "importance", "load", "mean_gates"):
            assert_matches_eager(
                lambda x, weight, name=name: getattr(vk.router(x, weight, **options), name),
                lambda x, weight, name=name: getattr(vk.router_reference(x, weight, **options), name),
                {"x": x, "weight": weight},
                ulps=8,
            )


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORWARD)
def test_activation_and_its_gradient_over_the_whole_range(name, dtype):
    largest = min(torch.finfo(dtype).max, 1e18)
    exponents = torch.linspace(-6, torch.tensor(largest, dtype=torch.float64).log10().item(), 400, dtype=torch.float64)
    x = torch.cat([-(10**exponents), torch.zeros(1, dtype=torch.float64), 10**exponents]).clamp(-largest, largest)
    pre = torch.cat([x, torch.linspace(-12, 12, 2001, dtype=torch.float64)]).to(dtype).unsqueeze(1)
    exact = pre.double().clone().requires_grad_()
    want = FORWARD[name](exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    eager = pre.clone().requires_grad_()
    eager_y = FORWARD[name](eager)
    (eager_slope,) = torch.autograd.grad(eager_y.sum(), eager)
    hidden, with_slope, grad = (torch.empty_like(pre) for _ in range(3))
    activate(name, pre, hidden)
    scale = torch.full_like(pre, 0.5, dtype=torch.promote_types(dtype, torch.float32))
    activate(name, pre, with_slope, grad, scale)
    grad.mul_(2.0)
    # In float64 the truth is eager itself, without an error to compare with.
    assert_within_budget("slope", grad, eager_slope, slope, ulps=64 if dtype == torch.float64 else 2)
    # Relative to each value: the largest would hide all others.
    scale = pre.double().abs().clamp(min=1.0)
    base, truth = (each.detach().double() / scale for each in (eager_y, want))
    for values in (hidden, with_slope):
        got = values.double() / scale
        assert got.isfinite().all()
        error, eager_error = ((each - truth).abs().max().item() for each in (got, base))
        assert error <= max(2 * eager_error, 4 * torch.finfo(dtype).eps)
