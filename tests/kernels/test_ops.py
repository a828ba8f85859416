"""The registered ops against their eager twins: outputs and every gradient by name, odd sizes, poison, opcheck."""

import pytest
import torch
from torch.library import opcheck

import vmoe_kernels as vk
from tests.conftest import relative_error
from vmoe_kernels.experts import cpu

SIZES = [
    # tokens, group, width, hidden, experts, selected, capacity factor
    (0, 1, 8, 16, 4, 2, 1.0),
    (1, 1, 1, 3, 1, 1, 1.0),
    (13, 13, 5, 7, 5, 3, 1.05),
    (40, 16, 48, 33, 8, 2, 0.5),
    (64, 16, 16, 32, 4, 1, 0.1),
    (50, 50, 8, 12, 32, 2, 4.0),
]


def _layer_inputs(size, dtype=torch.float64):
    tokens, _, width, hidden, experts, *_ = size
    make = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=make, dtype=dtype).requires_grad_()

    return {
        "x": randn(tokens, width),
        "router": randn(experts, width),
        "fc1_weight": randn(experts, hidden, width),
        "fc1_bias": randn(experts, hidden),
        "fc2_weight": randn(experts, width, hidden),
        "fc2_bias": randn(experts, width),
    }


def _route(inputs, size, impl, **kwargs):
    tokens, group, _, _, experts, selected, factor = size
    capacity = vk.compute_capacity(group, experts, factor, num_selected_experts=selected)
    rest = tokens % group
    last = vk.compute_capacity(rest, experts, factor, num_selected_experts=selected) if rest else capacity
    routing = vk.route(
        inputs["x"],
        inputs["router"],
        num_selected_experts=selected,
        capacity=capacity,
        group_size=group,
        last_capacity=last,
        impl=impl,
        **kwargs,
    )
    return routing, vk.rows_per_expert(tokens, group, capacity, last)


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_layer_equals_reference(size, batch_priority, noise_std):
    results = []
    for impl in ("auto", "reference"):
        inputs = _layer_inputs(size)
        seed = torch.tensor(5) if noise_std else None
        routing, rows = _route(inputs, size, impl, batch_priority=batch_priority, noise_std=noise_std, seed=seed)
        weights = [inputs[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
        y = vk.moe_mlp(inputs["x"], routing.slots, routing.gates, *weights, rows_per_expert=rows, impl=impl)
        sums = routing.importance.square().sum() + routing.load.sum() * 3 + routing.mean_gates.pow(3).sum()
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + sums + routing.logits.sum()
        loss.backward()
        results.append({"y": y, **routing._asdict()} | {name: tensor.grad for name, tensor in inputs.items()})
    for name, got in results[0].items():
        assert relative_error(got, results[1][name].detach()) <= 1e-11, name


@pytest.mark.parametrize("save", [True, False])
def test_blocks_of_rows_fit_their_memory(save, monkeypatch):
    # 13 rows are cut into blocks of 5, but the 8 or 9 that are filled make one block of 8 or two of 5.
    monkeypatch.setattr(cpu, "_BLOCK_FLOATS", 8 * 32)
    inputs = _layer_inputs((40, 40, 16, 32, 4, 1, 1.3))
    results = []
    for impl in ("auto", "reference"):
        routing, _ = _route(inputs, (40, 40, 16, 32, 4, 1, 1.3), impl)
        weights = [inputs[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
        with torch.set_grad_enabled(save):
            y = vk.moe_mlp(inputs["x"], routing.slots, routing.gates, *weights, rows_per_expert=16, impl=impl)
        if save:
            y.square().sum().backward()
        results.append([y] + [tensor.grad for tensor in inputs.values() if save])
        for tensor in inputs.values():
            tensor.grad = None
    for got, want in zip(*results):
        assert relative_error(got, want.detach()) <= 1e-11


def test_no_block_exceeds_the_largest():
    for hidden in (1, 2048, 3072, 1 << 21):
        for rows in (0, 1, 341, 342, 512, 513, 700, 864, 1025, 5000):
            blocks = list(cpu.row_blocks(rows, hidden))
            assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(rows))
            for fewer in range(0, rows + 1, max(rows // 50, 1)):
                sizes = [block.stop - block.start for block in cpu.row_blocks(fewer, hidden)]
                assert max(sizes, default=0) <= cpu.largest_block(rows, hidden)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_expert_mlp_equals_reference(activation, bias):
    size = (40, 16, 48, 33, 8, 2, 0.5)
    results = []
    for impl in ("auto", "reference"):
        inputs = _layer_inputs(size)
        x = torch.randn(8, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        biases = [inputs[name] if bias else None for name in ("fc1_bias", "fc2_bias")]
        y = vk.expert_mlp(
            x, inputs["fc1_weight"], biases[0], inputs["fc2_weight"], biases[1], activation=activation, impl=impl
        )
        y.pow(2).sum().backward()
        used = {name: t.grad for name, t in inputs.items() if t.grad is not None}
        results.append({"y": y, "d_x": x.grad} | used)
    assert results[0].keys() == results[1].keys()
    for name, got in results[0].items():
        assert relative_error(got, results[1][name].detach()) <= 1e-11, name


def test_dropout_is_drawn_again_in_backward():
    inputs = _layer_inputs((40, 16, 48, 33, 8, 2, 0.5))
    x = torch.randn(8, 9, 48, dtype=torch.float64)
    weights = [inputs[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]

    def mlp(x):
        return vk.expert_mlp(x, *weights, drop=0.4, seed=torch.tensor(11))

    assert torch.autograd.gradcheck(mlp, x[:, :2].requires_grad_(), atol=1e-6)
    assert torch.equal(mlp(x), mlp(x))
    zeros = torch.relu(torch.ones(1, 400, 1)) * torch.ones(1, 400, 1)
    kept = vk.expert_mlp(
        zeros,
        torch.ones(1, 50, 1),
        None,
        torch.ones(1, 1, 50) / 50,
        None,
        activation="relu",
        drop=0.4,
        seed=torch.tensor(3),
    )
    assert abs(kept.mean().item() - 1.0) < 0.02


def test_dispatch_and_combine_gradients():
    slots = torch.tensor([[0, 5], [-1, 1], [-1, -1], [4, 2]], dtype=torch.int32)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    for impl in ("auto", "reference"):
        assert torch.autograd.gradcheck(lambda x, impl=impl: vk.dispatch(x, slots, 6, impl=impl), x)
        buffer = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        combine = lambda buffer, gates, impl=impl: vk.combine(buffer, slots, gates, impl=impl)  # noqa: E731
        assert torch.autograd.gradcheck(combine, (buffer, gates))
    buffer = vk.dispatch(x, slots, 6)
    assert torch.equal(buffer[3], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(buffer[[0, 5, 1, 4, 2]], x[[0, 0, 1, 3, 3]])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_unused_rows_may_hold_anything(impl):
    slots = torch.tensor([[1], [-1]], dtype=torch.int32)
    buffer = torch.full((3, 4), torch.nan)
    buffer[1] = 2.0
    buffer.requires_grad_()
    gates = torch.tensor([[0.5], [0.5]], requires_grad=True)
    y = vk.combine(buffer, slots, gates, impl=impl)
    assert torch.equal(y, torch.tensor([[1.0] * 4, [0.0] * 4]))
    y.sum().backward()
    assert torch.equal(gates.grad, torch.tensor([[8.0], [0.0]]))
    assert torch.equal(buffer.grad, torch.tensor([[0.0] * 4, [0.5] * 4, [0.0] * 4]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_broken_token_stays_alone(value, impl):
    inputs = _layer_inputs((16, 16, 8, 8, 4, 2, 1.0), torch.float32)
    with torch.no_grad():
        inputs["x"][3] = value
    routing, rows = _route(inputs, (16, 16, 8, 8, 4, 2, 1.0), impl, batch_priority=True)
    assert ((routing.experts >= 0) & (routing.experts < 4)).all()
    assert (routing.slots < 4 * rows).all()
    weights = [inputs[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
    y = vk.moe_mlp(inputs["x"], routing.slots, routing.gates, *weights, rows_per_expert=rows, impl=impl)
    assert y[3].isnan().all()
    assert y[[i for i in range(16) if i != 3]].isfinite().all()


def test_all_tokens_to_one_expert_fill_it_in_priority_order():
    experts = torch.zeros(12, 1, dtype=torch.int32)
    gates = torch.tensor([0.5, 0.9, 0.5, 0.7, 0.5, 0.5, 0.9, 0.1, 0.2, 0.3, 0.9, 0.4]).view(12, 1)
    args = {"num_experts": 3, "capacity": 4}
    vanilla = vk.assign_slots(experts, gates, **args)
    assert (vanilla >= 0).flatten().tolist() == [True] * 4 + [False] * 8
    priority = vk.assign_slots(experts, gates, batch_priority=True, **args)
    assert (priority >= 0).flatten().nonzero().flatten().tolist() == [1, 3, 6, 10]


def test_first_choices_come_before_second_ones():
    experts = torch.tensor([[0, 1], [1, 0], [2, 0]], dtype=torch.int32)
    gates = torch.tensor([[0.4, 0.3], [0.9, 0.8], [0.95, 0.9]])
    slots = vk.assign_slots(experts, gates, num_experts=3, capacity=1, batch_priority=True)
    assert (slots >= 0).tolist() == [[True, False], [True, False], [True, False]]


def test_sum_priority_counts_all_gates():
    experts = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    gates = torch.tensor([[0.5, 0.1], [0.4, 0.3]])
    args = {"num_experts": 2, "capacity": 1, "batch_priority": True}
    assert (vk.assign_slots(experts, gates, **args) >= 0).tolist() == [[True, True], [False, False]]
    assert (vk.assign_slots(experts, gates, priority="sum", **args) >= 0).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_and_errors_bounded(dtype):
    size = (40, 16, 48, 33, 8, 2, 1.05)
    exact = _layer_inputs(size)
    routing, rows = _route(exact, size, "reference")
    weights = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    want = vk.moe_mlp(
        exact["x"], routing.slots, routing.gates, *[exact[n] for n in weights], rows_per_expert=rows, impl="reference"
    )
    narrow = {name: tensor.detach().to(dtype) for name, tensor in exact.items()}
    errors = {}
    for impl in ("auto", "reference"):
        y = vk.moe_mlp(
            narrow["x"],
            routing.slots,
            routing.gates.detach().float(),
            *[narrow[n] for n in weights],
            rows_per_expert=rows,
            impl=impl,
        )
        assert y.dtype == dtype
        errors[impl] = relative_error(y, want.detach())
    assert errors["auto"] <= 2 * errors["reference"] + 1e-7


def test_autocast_does_not_narrow_the_router():
    inputs = _layer_inputs((40, 16, 48, 33, 8, 2, 1.05), torch.float32)
    plain, _ = _route(inputs, (40, 16, 48, 33, 8, 2, 1.05), "auto")
    for impl in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            routing, _ = _route(inputs, (40, 16, 48, 33, 8, 2, 1.05), impl)
        assert torch.equal(routing.logits, plain.logits)


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_opcheck():
    size = (13, 5, 6, 7, 4, 2, 0.7)
    inputs = _layer_inputs(size, torch.float32)
    routing, rows = _route(inputs, size, "auto")
    slots, gates = routing.slots, routing.gates.detach().requires_grad_()
    weights = [inputs[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
    ops = torch.ops.vmoe
    x = inputs["x"]
    opcheck(ops.router, (x, inputs["router"], 2, 5, 1.0, torch.tensor(3)))
    opcheck(ops.assign_slots, (routing.experts, gates.detach(), 4, 5, 2, 2, True, "max"))
    opcheck(ops.assign_rows, (routing.experts, gates.detach(), 4, 5, 2, 2, True, "max"))
    opcheck(ops.dispatch, (x, slots, 4 * rows))
    opcheck(ops.combine, (torch.randn(4 * rows, 6, requires_grad=True), slots, gates))
    opcheck(ops.expert_mlp, (torch.randn(4, 3, 6, requires_grad=True), *weights, "gelu", 0.0, None, True))
    # The saved pre-activation of empty rows is never written, so every row is filled where outputs are compared.
    slots = torch.randperm(12, dtype=torch.int32).view(12, 1)
    x, gates = torch.randn(12, 6, requires_grad=True), torch.rand(12, 1, requires_grad=True)
    opcheck(ops.moe_mlp, (x, slots, gates, *weights, 3, "gelu_tanh", 0.0, None, True))
    opcheck(ops.moe_mlp, (x, slots, gates, weights[0], None, weights[2], None, 3, "silu", 0.0, None, True))
    choices = slots.view(-1).argsort().to(torch.int32)
    opcheck(ops.moe_mlp, (x, slots, gates, *weights, 3, "gelu_tanh", 0.0, None, True, choices))
