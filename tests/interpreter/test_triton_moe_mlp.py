"""The fused sparse MLP in Triton against its eager twin, in the interpreter."""

import sys
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.work import moe_mlp_costs
from vmoe_kernels import moe_mlp, moe_mlp_reference
from vmoe_kernels.common import launch
from vmoe_kernels.common.philox import philox_keep
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.experts.triton_moe_mlp import moe_mlp_backward_triton, moe_mlp_triton
from vmoe_kernels.testing import (
    ROUTINGS,
    assert_compiles_and_exports,
    assert_matches_eager,
    make_experts,
    make_routed,
    outputs_and_gradients,
    poisoned_memory,
)

GEMMS = (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS)
# (T, K, E, C, D)
ODD = (13, 3, 5, 4, 20)
SHAPES = ((0, 2, 4, 3, 8), (5, 1, 4, 0, 8), (1, 1, 1, 1, 1), ODD, (67, 2, 3, 70, 8), (9, 2, 3, 4, 768))
# float32 sums of two dozen products are a few roundings off, in eager PyTorch as here.
ULPS = 8


def _inputs(routing, shape, dtype=torch.float32, bias=True):
    _, _, num_experts, _, width = shape
    routed = make_routed(routing, shape, dtype)
    experts = make_experts((num_experts, width, 30, width + 2), dtype, bias=bias)
    return {**{name: routed[name] for name in ("x", "slots", "gates")}, **experts}


def _ops(shape, **options):
    """The op in Triton and its twin."""
    return (
        partial(moe_mlp, impl="triton", rows_per_expert=shape[3], **options),
        partial(moe_mlp_reference, rows_per_expert=shape[3], **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moe_mlp_matches_eager(shape, dtype):
    with poisoned_memory():
        assert_matches_eager(*_ops(shape), _inputs("random", shape, dtype), ulps=ULPS)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("library", [False, True])
def test_moe_mlp_matches_eager_however_it_is_routed(routing, library):
    with ExitStack() as stack:
        stack.enter_context(poisoned_memory())
        for op in GEMMS if library else ():
            stack.enter_context(launch.override(f"{op}/fp32", CUBLAS))
        assert_matches_eager(*_ops(ODD, activation="gelu"), _inputs(routing, ODD), ulps=ULPS)


def test_moe_mlp_mixes_our_gemms_with_the_library():
    for index in range(len(GEMMS)):
        with launch.override(GEMMS[index], CUBLAS), poisoned_memory():
            assert_matches_eager(*_ops(ODD), _inputs("random", ODD, torch.float16), ulps=ULPS)


def test_moe_mlp_needs_no_bias():
    assert_matches_eager(*_ops(ODD), _inputs("random", ODD, bias=False), ulps=ULPS)


def test_moe_mlp_takes_many_experts():
    shape = (13, 2, 32, 2, 8)
    assert_matches_eager(*_ops(shape), _inputs("random", shape, torch.float16), ulps=ULPS)


def test_moe_mlp_gives_nothing_to_what_was_dropped():
    got = outputs_and_gradients(_ops(ODD)[0], _inputs("dropped", ODD))
    assert len(got) == 7
    assert all(tensor.numel() > 0 and not tensor.any() for tensor in got.values())


def test_moe_mlp_keeps_an_idle_expert_out_of_everything():
    inputs = _inputs("one_expert", (4, 1, 3, 8, 16))
    assert set((inputs["slots"] // 8).flatten().tolist()) == {0}
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        inputs[name][1:] = torch.nan
    got = outputs_and_gradients(_ops((4, 1, 3, 8, 16))[0], inputs)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert not any(got[f"d_{name}"][1:].any() for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))


# The interpreter computes in NumPy, which warns of 0 times infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moe_mlp_shows_a_gate_that_is_not_finite(value):
    inputs = _inputs("random", ODD)
    dropped = (inputs["slots"] < 0).nonzero()[0]
    inputs["gates"][tuple(dropped)] = value
    y = _ops(ODD)[0](**inputs)
    assert y[dropped[0]].isnan().all()
    assert y[torch.arange(len(y)) != dropped[0]].isfinite().all()


def test_moe_mlp_drops_as_on_cuda(monkeypatch):
    def keep(seed, stream, shape, drop):
        return philox_keep(seed + stream, shape, drop)

    monkeypatch.setattr(sys.modules["vmoe_kernels.experts.expert_mlp_op"], "dropout_keep", keep)
    assert_matches_eager(*_ops(ODD, drop=0.3, seed=torch.tensor(11)), _inputs("random", ODD), ulps=ULPS)


def test_moe_mlp_backward_can_run_twice():
    inputs = _inputs("random", ODD)
    leaves = [tensor.requires_grad_() for tensor in inputs.values() if tensor.is_floating_point()]
    y = _ops(ODD)[0](**inputs)
    first, second = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def _saved_bytes(op, inputs):
    """Bytes that a forward keeps for its backward, each storage once, without the weights."""
    leaves = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    weights = {tensor.untyped_storage().data_ptr() for name, tensor in leaves.items() if name.startswith("fc")}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = op(**leaves)
    assert y.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("num_choices", [1, 2])
def test_moe_mlp_saves_less_than_half_of_what_eager_saves(num_choices):
    # A 64th of the 25,088 tokens of 128 images, in 16 bits, with V-MoE's hidden width of four times the width.
    num_tokens, num_experts, width = 25_088 // 64, 8, 96
    rows = -(-num_tokens * num_choices // num_experts)
    routed = make_routed("random", (num_tokens, num_choices, num_experts, rows, width), torch.float16)
    experts = make_experts((num_experts, width, 4 * width, width), torch.float16)
    inputs = {**{name: routed[name] for name in ("x", "slots", "gates")}, **experts}
    ours = _saved_bytes(partial(moe_mlp, impl="triton", rows_per_expert=rows), inputs)
    eager = _saved_bytes(partial(moe_mlp_reference, rows_per_expert=rows), inputs)
    assert 0 < ours <= 0.45 * eager, f"{ours} bytes are {ours / eager:.3f} of the eager twin's"


def test_moe_mlp_costs_count_the_flops_that_pytorch_counts():
    shape = (26, 2, 4, 13, 16)
    num_tokens, num_choices, num_experts, rows, width = shape
    routed = make_routed("random", shape, torch.float32)
    experts = make_experts((num_experts, width, 24, width), torch.float32)
    inputs = [routed["x"], routed["slots"], routed["gates"], *experts.values()]
    with FlopCounterMode(display=False) as counter:
        y = _ops(shape)[0](*(tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs))
        y.sum().backward()
    costs = moe_mlp_costs(num_tokens, num_choices, num_experts * rows, num_experts, width, 24, 4)
    assert sum(flops for flops, _ in costs.values()) == counter.get_total_flops()


def test_moe_mlp_takes_strided_inputs():
    inputs = _inputs("random", ODD)
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    op = _ops(ODD)[0]
    got, want = outputs_and_gradients(op, strided), outputs_and_gradients(op, inputs)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_moe_mlp_compiles_and_exports_as_one_graph():
    inputs, op = _inputs("random", ODD), _ops(ODD)[0]
    assert_compiles_and_exports(op, inputs)


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_moe_mlp_passes_opcheck():
    shape = (6, 1, 3, 2, 4)
    inputs = _inputs("random", shape)
    # Every row is held: what the saved pre-activation has in empty rows is undefined, and opcheck compares it.
    inputs["slots"] = torch.randperm(6, dtype=torch.int32).view(6, 1)
    inputs = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs.values()]
    opcheck(torch.ops.vmoe.moe_mlp.default, (*inputs, shape[3], "silu", 0.0, None, True))


def test_moe_mlp_rejects_float64():
    inputs = _inputs("random", ODD, torch.float64)
    x, slots, gates, *weights = inputs.values()
    with pytest.raises(ValueError, match="impl='triton' takes float16, bfloat16 and float32"):
        _ops(ODD)[0](**inputs)
    with pytest.raises(ValueError, match=r"x must be float16, bfloat16 or float32 .* got torch\.float64"):
        moe_mlp_triton(x, slots, gates, *weights, 4, "gelu", 0.0, None, False)
    with pytest.raises(ValueError, match=r"x must be float16, bfloat16 or float32 .* got torch\.float64"):
        moe_mlp_backward_triton(x, x, slots, gates, x, *weights, 4, "gelu", 0.0, None)
