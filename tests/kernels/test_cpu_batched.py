"""All experts' products at once on a CPU, where a problem is small: the same values, and chosen by shapes alone."""

import pytest
import torch

import vmoe_kernels as vk
from vmoe_kernels.experts import cpu_batched
from vmoe_kernels.experts.activations import FORWARD
from vmoe_kernels.experts.types import Activation, ExpertWeights
from vmoe_kernels.testing import outputs_and_gradients

NAMES = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def problem(tokens, selected, experts, rows, width, hidden, out, dtype=torch.float64):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    choices = torch.rand(tokens, experts).topk(selected, 1).indices.to(torch.int32)
    gates = torch.rand(tokens, selected, dtype=dtype)
    slots = vk.assign_slots(choices, gates, num_experts=experts, capacity=rows, batch_priority=True)
    weights = (randn(experts, hidden, width), randn(experts, hidden), randn(experts, out, hidden), randn(experts, out))
    return {"x": randn(tokens, width), "gates": gates.requires_grad_(), **dict(zip(NAMES, weights))}, slots


def run(inputs, slots, rows, activation="gelu_tanh", impl="auto", **options):
    settings = {"rows_per_expert": rows, "activation": activation, "impl": impl, **options}
    return outputs_and_gradients(lambda x, gates, *weights: vk.moe_mlp(x, slots, gates, *weights, **settings), inputs)


@pytest.fixture
def taken(monkeypatch):
    """The directions that were computed so."""
    calls = []
    for name in ("outputs", "gradients"):
        function = getattr(cpu_batched, name)
        monkeypatch.setattr(cpu_batched, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    return calls


@pytest.mark.parametrize("activation", FORWARD)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("size", [(90, 2, 4, 50, 5, 7, 3), (150, 1, 3, 48, 8, 16, 8), (220, 3, 12, 48, 4, 33, 4)])
def test_values_and_gradients_are_the_twins(taken, size, biases, activation):
    inputs, slots = problem(*size)
    if not biases:
        inputs |= {"fc1_bias": None, "fc2_bias": None}
    assert (slots < 0).any() or size[3] == 50
    got = run(inputs, slots, size[3], activation)
    assert taken == ["outputs", "gradients"]
    want = run(inputs, slots, size[3], activation, impl="reference")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_gates_of_another_dtype(taken, dtypes):
    inputs, slots = problem(100, 2, 4, 48, 5, 7, 3)
    inputs = {name: value.to(dtypes[name == "gates"]) for name, value in inputs.items()}
    got, want = run(inputs, slots, 48), run(inputs, slots, 48, impl="reference")
    assert taken == ["outputs", "gradients"]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_blocks_of_rows_cover_all(taken, monkeypatch):
    inputs, slots = problem(90, 2, 4, 50, 5, 7, 3)
    want = run(inputs, slots, 50)
    monkeypatch.setattr("vmoe_kernels.experts.cpu._BLOCK_FLOATS", 80)
    got = run(inputs, slots, 50)
    assert taken == 2 * ["outputs", "gradients"]
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_nan_shows_where_the_twin_has_it(taken):
    inputs, slots = problem(100, 2, 4, 48, 5, 7, 3)
    dropped = (slots < 0).nonzero()
    assert len(dropped) > 0
    with torch.no_grad():
        inputs["gates"][tuple(dropped[0])] = torch.nan
        inputs["x"][7, 2] = torch.inf
    got, want = run(inputs, slots, 48), run(inputs, slots, 48, impl="reference")
    assert taken == ["outputs", "gradients"]
    for name in ("output", "d_gates"):
        torch.testing.assert_close(got[name], want[name], equal_nan=True)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("few rows", {"rows": 47, "tokens": 94}),
        ("empty rows", {"rows": 120}),
        ("16 bits", {"dtype": torch.bfloat16}),
        ("a large layer", {"hidden": (6 << 20) // 192 + 1}),
    ],
)
def test_what_is_left_to_the_loops(reason, changes):
    size = {"tokens": 96, "experts": 4, "rows": 48, "hidden": 8, "dtype": torch.float32}
    for chosen, case in ((True, size), (False, {**size, **changes})):
        x = torch.empty(case["tokens"], 8, dtype=case["dtype"])
        slots = torch.empty(case["tokens"], 2, dtype=torch.int32)
        fc1 = torch.empty(case["experts"], case["hidden"], 8)
        weights = ExpertWeights(fc1, None, fc1, None)
        assert cpu_batched.takes(x, slots, weights, Activation("relu"), case["rows"]) == chosen, reason


def test_threads_are_counted_once(monkeypatch):
    """A backward with other threads than its forward must take the same way."""
    most = cpu_batched.most_floats()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if most > 1 << 20 else 2)
    assert cpu_batched.most_floats() == most


def test_dropout_is_left_to_the_loops(taken):
    inputs, slots = problem(90, 2, 4, 50, 5, 7, 3)
    run(inputs, slots, 50, drop=0.1, seed=torch.tensor(3))
    assert taken == []


def test_roomier_capacity_changes_nothing(taken):
    inputs, slots = problem(190, 1, 4, 48, 24, 40, 24, torch.float32)
    y = run(inputs, slots, 48)["output"]
    roomy = torch.where(slots < 0, -1, slots // 48 * 50 + slots % 48)
    torch.testing.assert_close(run(inputs, roomy, 50)["output"], y)
    assert taken == 2 * ["outputs", "gradients"]
