"""Dropless slots and experts: the NumPy definition, the same as roomy capacities bit for bit, and what ops must do."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.func import grad, vmap
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import vmoe_kernels as vk
from tests.conftest import relative_error
from vmoe_kernels.common.groups import dropless_rows
from vmoe_kernels.common.impl import row_tile
from vmoe_kernels.routing import dropless_slots
from vmoe_kernels.testing import (
    assert_compiles_and_exports,
    assert_matches_eager,
    make_experts,
    outputs_and_gradients,
    poisoned_memory,
)

# T, K, E, S
SHAPES = ((0, 2, 3, 1), (1, 1, 1, 1), (13, 3, 5, 4), (40, 2, 4, 40), (64, 4, 4, 16), (9, 2, 200, 3))
D, H, O = 6, 10, 7  # noqa: E741


def make_choices(num_tokens, num_choices, num_experts, *, kind="random", seed=0):
    """(T, K) int32: different experts for each token."""
    make = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts, generator=make)[:num_choices] for _ in range(num_tokens)]
    experts = torch.stack(rows) if rows else torch.empty(0, num_choices)
    if kind == "one_expert":
        experts = torch.arange(num_choices).expand(num_tokens, -1) + (num_experts - num_choices)
    elif kind == "none":
        experts = torch.full((num_tokens, num_choices), -1)
    elif kind == "some":
        experts[torch.rand(experts.shape, generator=make) < 0.4] = -1
    return experts.to(torch.int32).contiguous()


def make_inputs(experts, num_experts, dtype=torch.float64, bias=True, seed=1):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(len(experts), D, generator=make).to(dtype)
    gates = torch.rand(experts.shape, generator=make).to(torch.float64 if dtype == torch.float64 else torch.float32)
    slots, spans = vk.assign_dropless_slots(experts, num_experts=num_experts)
    weights = make_experts((num_experts, D, H, O), dtype, bias=bias, seed=seed)
    return {"x": x, "slots": slots, "spans": spans, "gates": gates, **weights}


def slots_by_hand(experts, num_experts, group_size, tile):
    """Group by group, first choices before second ones; parts begin at whole tiles."""
    queues = [[] for _ in range(num_experts)]
    for first in range(0, len(experts), group_size):
        for k in range(experts.shape[1]):
            for token in range(first, min(first + group_size, len(experts))):
                if experts[token, k] >= 0:
                    queues[experts[token, k]].append((token, k))
    slots, spans, begin = np.full(experts.shape, -1), [], 0
    for queue in queues:
        for place, choice in enumerate(queue):
            slots[choice] = begin + place
        spans.append((begin, begin + len(queue)))
        begin += -(-len(queue) // tile) * tile
    return slots, np.array(spans).T, begin


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("tile", [1, 4, 128])
@pytest.mark.parametrize("kind", ["random", "one_expert", "some", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slots_are_those_of_the_definition(shape, kind, tile, impl):
    num_tokens, num_choices, num_experts, group = shape
    experts = make_choices(num_tokens, num_choices, num_experts, kind=kind)
    got = vk.assign_dropless_slots(experts, num_experts=num_experts, group_size=group, tile=tile, impl=impl)
    slots, spans, rows = slots_by_hand(experts.numpy(), num_experts, group, tile)
    assert got.slots.dtype == got.spans.dtype == torch.int32
    assert np.array_equal(got.slots.numpy(), slots)
    assert np.array_equal(got.spans.numpy(), spans)
    limit = dropless_rows(experts.numel(), num_experts, tile)
    assert rows <= limit <= experts.numel() + num_experts * (tile - 1)
    assert limit % tile == 0


def mlp_by_hand(x, experts, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """y_t = sum over k of gate * W2 gelu(W1 x + b1) + b2, in float64."""
    y = np.zeros((len(x), fc2_weight.shape[1]))
    for (token, k), e in np.ndenumerate(experts):
        if e >= 0:
            pre = fc1_weight[e] @ x[token] + fc1_bias[e]
            cube = pre + 0.044715 * pre**3
            hidden = 0.5 * pre * (1 + np.tanh(math.sqrt(2 / math.pi) * cube))
            y[token] += gates[token, k] * (fc2_weight[e] @ hidden + fc2_bias[e])
    return y


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["random", "one_expert", "some", "none"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_mlp_is_that_of_the_definition(shape, kind, impl):
    num_tokens, num_choices, num_experts, _ = shape
    experts = make_choices(num_tokens, num_choices, num_experts, kind=kind)
    inputs = make_inputs(experts, num_experts)
    y = vk.dropless_mlp(**inputs, impl=impl)
    x, _, _, gates, *weights = (each.numpy() for each in inputs.values())
    want = mlp_by_hand(x, experts.numpy(), gates, *weights)
    assert relative_error(y, torch.from_numpy(want)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_choices", "group"), [(1, 8), (2, 8), (3, 25), (5, 25)])
def test_roomy_capacities_give_the_same_bits(num_choices, group, dtype):
    """Outputs and every gradient of a layer whose experts have a slot for every token of a group."""
    num_tokens, num_experts = 25, 5
    experts = make_choices(num_tokens, num_choices, num_experts)
    inputs = make_inputs(experts, num_experts, dtype)
    settings = {"num_experts": num_experts, "group_size": group}
    inputs["slots"], inputs["spans"] = vk.assign_dropless_slots(experts, **settings)
    rest = num_tokens % group or group
    slots = vk.assign_slots(experts, inputs["gates"], capacity=group, last_capacity=rest, **settings)
    rows = vk.rows_per_expert(num_tokens, group, group, rest)
    roomy = {name: value for name, value in inputs.items() if name != "spans"} | {"slots": slots}
    got = outputs_and_gradients(vk.dropless_mlp, inputs)
    want = outputs_and_gradients(partial(vk.moe_mlp, rows_per_expert=rows), roomy)
    assert got.keys() == want.keys()
    assert len(got) == 7
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "one_expert", "some"])
def test_mlp_matches_eager(kind, dtype):
    experts = make_choices(40, 2, 4, kind=kind)
    with poisoned_memory():
        assert_matches_eager(vk.dropless_mlp, vk.dropless_mlp_reference, make_inputs(experts, 4, dtype), ulps=4)


def test_gradients_are_those_of_differences():
    inputs = make_inputs(make_choices(5, 2, 3, kind="some"), 3)
    slots, spans = inputs["slots"], inputs["spans"]
    leaves = [each.requires_grad_() for each in inputs.values() if each.is_floating_point()]
    drop = {"drop": 0.3, "seed": torch.tensor(3)}
    for op in (vk.dropless_mlp, vk.dropless_mlp_reference):
        run = lambda x, *others, op=op: op(x, slots, spans, *others, **drop)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)


def test_mlp_needs_no_bias():
    inputs = make_inputs(make_choices(13, 2, 4), 4, torch.float32, bias=False)
    assert inputs["fc1_bias"] is None
    assert_matches_eager(vk.dropless_mlp, vk.dropless_mlp_reference, inputs, ulps=4)


def test_an_idle_expert_stays_out_of_everything():
    inputs = make_inputs(make_choices(9, 2, 6, kind="one_expert"), 6)
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        inputs[name][:4] = torch.nan
    got = outputs_and_gradients(vk.dropless_mlp, inputs)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert not any(got[f"d_{name}"][:4].any() for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))


def test_dropout_follows_the_choice():
    """The same masks wherever the rows lie, drawn again in the backward, and in the twin."""
    experts = make_choices(40, 2, 4)
    inputs = make_inputs(experts, 4, torch.float32)
    drop = {"drop": 0.4, "seed": torch.tensor(11)}
    got = outputs_and_gradients(partial(vk.dropless_mlp, **drop), inputs)
    again = outputs_and_gradients(partial(vk.dropless_mlp, **drop), inputs)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert_matches_eager(partial(vk.dropless_mlp, **drop), partial(vk.dropless_mlp_reference, **drop), inputs, ulps=4)
    others = dict(zip(("slots", "spans"), vk.assign_dropless_slots(experts, num_experts=4, tile=16)))
    assert not torch.equal(others["slots"], inputs["slots"])
    assert torch.equal(vk.dropless_mlp(**inputs | others, **drop), got["output"])
    assert not torch.equal(got["output"], vk.dropless_mlp(**inputs))


def test_flops_are_those_of_the_choices():
    experts = make_choices(13, 3, 5)
    inputs = make_inputs(experts, 5)
    with FlopCounterMode(display=False) as counter:
        vk.dropless_mlp(*(each.requires_grad_() if each.is_floating_point() else each for each in inputs.values()))
    assert counter.get_total_flops() == 2 * 13 * 3 * (D * H + H * O)
    with FlopCounterMode(display=False) as counter:
        y = vk.dropless_mlp(**inputs)
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 13 * 3 * (D * H + H * O)


def test_ops_compile_and_export_as_one_graph():
    inputs = make_inputs(make_choices(13, 2, 4), 4, torch.float32)
    experts = make_choices(13, 2, 4)

    def op(x, gates, *weights):
        slots, spans = vk.assign_dropless_slots(experts, num_experts=4, group_size=5)
        return vk.dropless_mlp(x, slots, spans, gates, *weights)

    leaves = {name: each for name, each in inputs.items() if each.is_floating_point()}
    assert_compiles_and_exports(op, leaves)


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    experts = make_choices(13, 2, 4)
    opcheck(torch.ops.vmoe.assign_dropless_slots, (experts, 4, 5, 1))
    opcheck(torch.ops.vmoe.assign_dropless_slots, (experts, 4, 5, 16))
    inputs = make_inputs(experts, 4, torch.float32, bias=bias)
    values = [
        each.requires_grad_() if each is not None and each.is_floating_point() else each for each in inputs.values()
    ]
    opcheck(torch.ops.vmoe.dropless_mlp, (*values, "silu", 0.0, None, True))


@pytest.mark.parametrize("own_weights", [False, True])
def test_vmap_is_a_loop_over_samples(own_weights):
    count, num_experts = 3, 4
    experts = torch.stack([make_choices(11, 2, num_experts, kind="some", seed=b) for b in range(count)])
    samples = [make_inputs(each, num_experts, seed=b) for b, each in enumerate(experts)]
    names = ("x", "gates", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    data = [torch.stack([each[name] for each in samples]) for name in names]
    if not own_weights:
        data[2:] = [each[0] for each in data[2:]]
    in_dims = (0, 0, 0) + (0 if own_weights else None,) * 4

    def layer(experts, x, gates, *weights):
        slots, spans = vk.assign_dropless_slots(experts, num_experts=num_experts, group_size=11)
        return vk.dropless_mlp(x, slots, spans, gates, *weights), slots, spans

    results = []
    for run in ("vmap", "loop"):
        leaves = [each.clone().requires_grad_() for each in data]
        if run == "vmap":
            y, *ints = vmap(layer, in_dims)(experts, *leaves)
        else:
            parts = [
                layer(experts[b], *(each if dim is None else each[b] for each, dim in zip(leaves, in_dims[1:])))
                for b in range(count)
            ]
            y, *ints = map(torch.stack, zip(*parts))
        y.square().sum().backward()
        results.append((ints, [y.detach(), *(each.grad for each in leaves)]))
    assert all(torch.equal(got, want) for got, want in zip(results[0][0], results[1][0]))
    for got, want in zip(results[0][1], results[1][1]):
        assert relative_error(got, want) <= 1e-12
    with pytest.raises(ValueError, match=r"vmap over dropless_mlp needs drop=0, got 0\.1"):
        vmap(partial(vk.dropless_mlp, drop=0.1, seed=torch.tensor(1)), (0, 0, 0, 0, None, None, None, None))(
            data[0], *(torch.stack(each) for each in zip(*((s["slots"], s["spans"]) for s in samples))), data[1],
            *(samples[0][name] for name in names[2:]),
        )  # fmt: skip


def test_transforms_and_second_derivatives_are_the_twins():
    experts = make_choices(7, 2, 4)
    inputs = make_inputs(experts, 4)

    def loss(x, impl):
        slots, spans = vk.assign_dropless_slots(experts, num_experts=4, impl=impl)
        return vk.dropless_mlp(**inputs | {"x": x, "slots": slots, "spans": spans}, impl=impl).pow(3).sum()

    x = inputs["x"]
    want = grad(partial(loss, impl="reference"))(x)
    assert relative_error(grad(partial(loss, impl="auto"))(x), want) <= 1e-13
    x = x.clone().requires_grad_()
    second = []
    for impl in ("auto", "reference"):
        (first,) = torch.autograd.grad(loss(x, impl), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert relative_error(*second) <= 1e-12


def test_autocast_does_not_narrow_it():
    inputs = make_inputs(make_choices(13, 2, 4), 4, torch.float32)
    for impl in ("auto", "reference"):
        want = vk.dropless_mlp(**inputs, impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vk.dropless_mlp(**inputs, impl=impl), want)


def test_slots_lie_the_same_on_every_device():
    assert row_tile(torch.device("cpu")) == 1
    assert row_tile(torch.device("cuda")) == 128
    experts = make_choices(40, 2, 4)
    slots, spans = vk.assign_dropless_slots(experts, num_experts=4)
    assert torch.equal(slots, vk.assign_dropless_slots(experts, num_experts=4, tile=128).slots)
    assert not (spans[0] % 128).any()


def test_a_gpu_refuses_tiles_that_its_products_would_share(monkeypatch):
    monkeypatch.setattr(dropless_slots, "row_tile", lambda device: 128)
    experts = make_choices(40, 2, 4)
    with pytest.raises(ValueError, match="tile must be a multiple of 128 on cpu, got 64"):
        vk.assign_dropless_slots(experts, num_experts=4, tile=64)
    assert vk.assign_dropless_slots(experts, num_experts=4, tile=256).slots.shape == (40, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": torch.zeros(3, 2)}, r"experts must be \(T, K\) int32, got \(3, 2\) torch.float32"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"group_size": 0}, "group_size must be at least 1 token, got 0"),
        ({"tile": 0}, "tile must be at least 1 row, got 0"),
        ({"tile": 2**31}, r"the buffer must have fewer than 2\*\*31 rows, got"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_slots_refuse(changes, message):
    arguments = {"experts": torch.zeros(3, 1, dtype=torch.int32), "num_experts": 2} | changes
    with pytest.raises(ValueError, match=message):
        vk.assign_dropless_slots(arguments.pop("experts"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3)}, r"x must be \(T, D\), got \(3,\)"),
        ({"slots": torch.zeros(3, 2)}, "slots must be int32, got torch.float32"),
        ({"spans": torch.zeros(2, 3)}, r"spans must be \(2, 4\) int32 on cpu, got \(2, 3\) torch.float32 on cpu"),
        ({"gates": torch.zeros(13, 1)}, r"gates must have the shape of slots \(13, 2\), got \(13, 1\)"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1.0"),
        ({"drop": 0.5}, "seed must be a 0-dim int64 tensor when drop > 0, got None"),
    ],
)
def test_mlp_refuses(changes, message):
    inputs = make_inputs(make_choices(13, 2, 4), 4)
    with pytest.raises(ValueError, match=message):
        vk.dropless_mlp(**inputs | changes)
