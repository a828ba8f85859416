"""Forward-mode AD, torch.func and second derivatives: the values of the eager twins, whatever the transform."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves

import vmoe_kernels as vk
from tests.conftest import relative_error

T, K, E, D, H, GROUP, CAPACITY, LAST = 13, 2, 4, 5, 7, 8, 4, 3
ROWS = vk.rows_per_expert(T, GROUP, CAPACITY, LAST)


def make_inputs() -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = {"x": (T, D), "router": (E, D), "fc1": (E, H, D), "b1": (E, H), "fc2": (E, D, H), "b2": (E, D)}
    return {name: torch.randn(shape, generator=make, dtype=torch.float64) for name, shape in shapes.items()}


SLOTS = torch.randperm(E * ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.int32)[: T * K].view(T, K)
SLOTS[::5, 1] = -1
GATES = torch.linspace(0.1, 0.9, T * K, dtype=torch.float64).view(T, K)


def _layer(impl: str, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Router, slots, and the experts' way through one op and through three."""
    x, router, *weights = inputs.values()
    routing = vk.route(
        x,
        router,
        num_selected_experts=K,
        capacity=CAPACITY,
        group_size=GROUP,
        last_capacity=LAST,
        batch_priority=True,
        noise_std=1.0,
        seed=torch.tensor(3),
        impl=impl,
    )
    slots, gates = routing.slots, routing.gates
    y = vk.moe_mlp(x, slots, gates, *weights, rows_per_expert=ROWS, impl=impl)
    buffer = vk.dispatch(x, slots, E * ROWS, impl=impl).view(E, ROWS, D)
    out = vk.expert_mlp(buffer, *weights, activation="silu", drop=0.3, seed=torch.tensor(5), impl=impl)
    z = vk.combine(out.flatten(0, 1), slots, gates, impl=impl)
    return y, z, routing.logits, routing.importance, routing.load, routing.mean_gates


def _op(name: str, impl: str, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One op on its own, of the inputs that it takes."""
    x, router, *weights = inputs.values()
    slots, gates = SLOTS, GATES * x.sum().sin()
    if name == "dispatch":
        return (vk.dispatch(x, slots, E * ROWS, impl=impl),)
    if name == "combine":
        return (vk.combine(x.repeat(4, 1)[: E * ROWS], slots, gates, impl=impl),)
    if name == "router":
        return vk.router(x, router, num_selected_experts=K, group_size=GROUP, impl=impl)[:1]
    if name == "expert_mlp":
        return (vk.expert_mlp(x[:12].reshape(E, 3, D), *weights, impl=impl),)
    return (vk.moe_mlp(x, slots, gates, *weights, rows_per_expert=ROWS, impl=impl),)


FUNCTIONS = {
    "layer": _layer,
    **{name: partial(_op, name) for name in ("dispatch", "combine", "router", "expert_mlp", "moe_mlp")},
}


def _tangents(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.roll(1, 0).cos() for name, value in inputs.items()}


def _loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return sum((factor + 1) * output.pow(3).sum() for factor, output in enumerate(outputs))


def _jvp(function, inputs):
    return jvp(function, (inputs,), (_tangents(inputs),))


def _dual(function, inputs):
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(inputs[name], tangent) for name, tangent in _tangents(inputs).items()}
        return [forward_ad.unpack_dual(output).tangent for output in function(duals)]


def _of_x(function, inputs):
    return lambda x: function({**inputs, "x": x})


def _create_graph(function, inputs, second: bool = True):
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(_loss(function(leaves)), list(leaves.values()), create_graph=second, **options)
    if not second:
        return first
    return torch.autograd.grad(sum(each.pow(2).sum() for each in first), list(leaves.values()), **options)


TRANSFORMS: dict[str, Callable] = {
    "jvp": _jvp,
    "dual": _dual,
    "linearize": lambda f, inputs: linearize(_of_x(f, inputs), inputs["x"])[1](inputs["x"].cos()),
    "jacfwd": lambda f, inputs: jacfwd(_of_x(f, inputs))(inputs["x"]),
    "grad": lambda f, inputs: grad(lambda inputs: _loss(f(inputs)))(inputs),
    "vjp": lambda f, inputs: vjp(lambda x: _loss(_of_x(f, inputs)(x)), inputs["x"])[1](torch.tensor(2.0).double()),
    "jacrev": lambda f, inputs: jacrev(_of_x(f, inputs))(inputs["x"]),
    "hessian": lambda f, inputs: hessian(lambda x: _loss(_of_x(f, inputs)(x)))(inputs["x"]),
    "hessian-vector": lambda f, inputs: jvp(
        grad(lambda x: _loss(_of_x(f, inputs)(x))), (inputs["x"],), (inputs["x"].cos(),)
    ),
    "per sample": lambda f, inputs: vmap(grad(lambda x: _loss(_of_x(f, inputs)(x))))(
        torch.stack([inputs["x"], 2 * inputs["x"]])
    ),
    "create_graph": _create_graph,
    "functional": lambda f, inputs: torch.autograd.functional.hessian(
        lambda x: _loss(_of_x(f, inputs)(x)), inputs["x"]
    ),
    "batched backward": lambda f, inputs: torch.autograd.functional.jacobian(
        lambda x: f({**inputs, "x": x})[0], inputs["x"], vectorize=True
    ),
}


# linearize's own.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_transform_equals_reference(function, transform):
    got, want = (
        tree_leaves(TRANSFORMS[transform](partial(FUNCTIONS[function], impl), make_inputs()))
        for impl in ("auto", "reference")
    )
    assert len(got) == len(want)
    assert any(each.abs().max() > 0 for each in want)
    for each, expected in zip(got, want):
        assert relative_error(each, expected) <= 1e-12


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_equals_reverse_mode(function):
    inputs = make_inputs()
    run = partial(FUNCTIONS[function], "auto")
    tangents = _tangents(inputs)
    _, got = jvp(lambda inputs: _loss(run(inputs)), (inputs,), (tangents,))
    gradients = _create_graph(run, inputs, second=False)
    want = sum((gradient * tangents[name]).sum() for name, gradient in zip(inputs, gradients))
    assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_transform_inside_a_compiled_function_equals_eager(transform):
    run = partial(TRANSFORMS[transform], partial(_layer, "auto"))
    got = tree_leaves(torch.compile(run, fullgraph=True, backend="aot_eager")(make_inputs()))
    for each, want in zip(got, tree_leaves(run(make_inputs())), strict=True):
        assert relative_error(each, want) <= 1e-12


def test_one_tensor_in_two_places_has_both_gradients():
    x = make_inputs()["x"][:4].requires_grad_()
    slots = torch.arange(8, dtype=torch.int32).view(4, 2)
    results = []
    for impl in ("auto", "reference"):
        # The buffer holds the gates as well.
        y = vk.combine(x.repeat(2, 1), slots, x[:, :2], impl=impl)
        results.append(torch.autograd.grad(_loss((y,)), x, create_graph=True)[0])
        z = vk.combine(x, slots[:2] % 4, x[:2, :2].detach(), impl=impl)
        results.append(torch.autograd.grad(_loss((z,)), x, create_graph=True)[0])
    assert relative_error(results[0], results[2]) <= 1e-12
    assert relative_error(results[1], results[3]) <= 1e-12
