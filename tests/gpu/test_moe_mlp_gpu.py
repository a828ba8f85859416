"""The fused sparse MLP in Triton on a GPU: the interpreter's checks with bfloat16, and what only a GPU can show."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

from vmoe_kernels import moe_mlp, moe_mlp_reference
from vmoe_kernels.common import launch
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.testing import (
    ROUTINGS,
    assert_graph_replays,
    assert_matches_eager,
    forbidden_synchronisation,
    make_experts,
    make_routed,
    outputs_and_gradients,
    poisoned_memory,
    products_of_float32,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GEMMS = (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS)
# (T, K, E, C, D)
ODD = (13, 3, 5, 4, 20)
SHAPES = ((0, 2, 4, 3, 8), (5, 1, 4, 0, 8), (1, 1, 1, 1, 1), ODD, (67, 2, 3, 70, 8), (197 * 8, 2, 32, 104, 768))
LARGE = SHAPES[-1]
ULPS = 8


def _inputs(routing, shape, dtype, seed=0):
    _, _, num_experts, _, width = shape
    routed = make_routed(routing, shape, dtype, device="cuda", seed=seed)
    experts = make_experts((num_experts, width, 4 * width, width), dtype, device="cuda", seed=seed)
    return {**{name: routed[name] for name in ("x", "slots", "gates")}, **experts}


def _ops(shape, **options):
    """The op in Triton and its twin."""
    return (
        partial(moe_mlp, impl="triton", rows_per_expert=shape[3], **options),
        partial(moe_mlp_reference, rows_per_expert=shape[3], **options),
    )


@pytest.mark.parametrize("shape", [(0, 2, 4, 3, 8), ODD, (67, 2, 3, 70, 8), (230, 2, 3, 150, 208)], ids=str)
def test_moe_mlp_in_tf32_is_as_near_as_its_11_bits_are(shape):
    op, twin = _ops(shape)
    inputs = _inputs("random", shape, torch.float32)
    with products_of_float32("tf32"):
        got = outputs_and_gradients(op, inputs)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    for name, want in outputs_and_gradients(twin, wide).items():
        assert torch.linalg.norm(got[name] - want) <= 2**-9 * torch.linalg.norm(want), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moe_mlp_matches_eager(shape, routing, dtype):
    with poisoned_memory():
        assert_matches_eager(*_ops(shape), _inputs(routing, shape, dtype), ulps=ULPS)
    assert_matches_eager(*_ops(shape), _inputs(routing, shape, dtype), ulps=ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moe_mlp_matches_eager_with_the_library_gemms(dtype):
    with ExitStack() as stack:
        for op in GEMMS:
            stack.enter_context(launch.override(f"{op}/fp32" if dtype == torch.float32 else op, CUBLAS))
        for shape in (ODD, LARGE):
            assert_matches_eager(*_ops(shape), _inputs("random", shape, dtype), ulps=ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moe_mlp_drops_as_its_twin(dtype):
    ops = _ops(ODD, drop=0.3, seed=torch.tensor(2**40 + 5, device="cuda"))
    assert_matches_eager(*ops, _inputs("random", ODD, dtype), ulps=ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moe_mlp_is_bitwise_equal_in_two_runs(dtype):
    inputs = _inputs("random", LARGE, dtype)
    first, second = (outputs_and_gradients(_ops(LARGE)[0], inputs) for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_moe_mlp_replays_in_a_cuda_graph():
    first, second = (_inputs("random", LARGE, torch.bfloat16, seed=seed) for seed in (0, 5))
    assert_graph_replays(_ops(LARGE)[0], first, second)


def test_moe_mlp_never_synchronises():
    inputs = _inputs("random", ODD, torch.bfloat16)
    op = _ops(ODD, drop=0.1, seed=torch.tensor(3, device="cuda"))[0]
    leaves = [tensor.requires_grad_() for tensor in inputs.values() if tensor.is_floating_point()]
    op(**inputs).sum().backward()
    with forbidden_synchronisation():
        torch.autograd.grad(op(**inputs).sum(), leaves)


def test_moe_mlp_keeps_an_idle_expert_out_of_everything():
    inputs = _inputs("one_expert", (4, 1, 3, 8, 16), torch.bfloat16)
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        inputs[name][1:] = torch.nan
    got = outputs_and_gradients(_ops((4, 1, 3, 8, 16))[0], inputs)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert not any(got[f"d_{name}"][1:].any() for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))


def test_moe_mlp_gathers_from_more_than_2_to_the_31_elements(needs_free_memory):
    needs_free_memory(24)
    num_tokens, shape = 2**31 // 768 + 10, (2, 1, 2, 4, 768)
    few = _inputs("random", shape, torch.bfloat16)
    few["slots"] = torch.tensor([[1], [6]], device="cuda", dtype=torch.int32)
    few["gates"] = torch.tensor([[0.5], [0.25]], device="cuda")
    many = {**few, "x": torch.zeros(num_tokens, 768, device="cuda", dtype=torch.bfloat16)}
    assert many["x"].numel() > 2**31
    many["slots"] = torch.full((num_tokens, 1), -1, device="cuda", dtype=torch.int32)
    many["gates"] = torch.ones(num_tokens, 1, device="cuda")
    ends = [0, num_tokens - 1]
    for name in ("x", "slots", "gates"):
        many[name][ends] = few[name]
    d_few = torch.randn(2, 768, generator=torch.Generator().manual_seed(2)).to("cuda", torch.bfloat16)
    d_many = torch.zeros_like(many["x"])
    d_many[ends] = d_few
    op = _ops(shape)[0]
    want, got = outputs_and_gradients(op, few, d_few), outputs_and_gradients(op, many, d_many)
    for name, tensor in want.items():
        ours = got[name][ends] if name in ("output", "d_x", "d_gates") else got[name]
        assert torch.equal(ours, tensor), name
    assert not got["output"][1:-1].any()
    assert not got["d_x"][1:-1].any()
