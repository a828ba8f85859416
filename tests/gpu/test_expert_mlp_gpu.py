"""The expert MLP in Triton on a GPU: the interpreter's checks with bfloat16, and what only a GPU can show."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

from vmoe_kernels import expert_mlp, expert_mlp_reference
from vmoe_kernels.common import launch
from vmoe_kernels.experts.activations import FORWARD
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.testing import (
    assert_graph_replays,
    assert_matches_eager,
    forbidden_synchronisation,
    make_experts,
    outputs_and_gradients,
    poisoned_memory,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRITON = partial(expert_mlp, impl="triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GEMMS = (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS)
# (E, R, D, H, O)
ODD = (3, 13, 20, 70, 33)
LARGE = (8, 412, 768, 3072, 768)
ULPS = 8


def _inputs(shape, dtype, bias=True, seed=0):
    num_experts, rows, width, hidden, out = shape
    x = torch.randn(num_experts, rows, width, generator=torch.Generator().manual_seed(seed + 1)).to("cuda", dtype)
    return {"x": x, **make_experts((num_experts, width, hidden, out), dtype, bias=bias, device="cuda", seed=seed)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", FORWARD)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 70, 8, 65, 130), (4, 0, 8, 8, 8), (2, 300, 192, 160, 192), ODD, LARGE], ids=str
)
def test_expert_mlp_matches_eager(shape, activation, dtype):
    op, reference = (partial(fn, activation=activation) for fn in (TRITON, expert_mlp_reference))
    with poisoned_memory():
        assert_matches_eager(op, reference, _inputs(shape, dtype), ulps=ULPS)
    assert_matches_eager(op, reference, _inputs(shape, dtype), ulps=ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_mlp_matches_eager_with_the_library_gemms(dtype):
    with ExitStack() as stack:
        for op in GEMMS:
            stack.enter_context(launch.override(f"{op}/fp32" if dtype == torch.float32 else op, CUBLAS))
        assert_matches_eager(TRITON, expert_mlp_reference, _inputs(LARGE, dtype, bias=False), ulps=ULPS)
        assert_matches_eager(TRITON, expert_mlp_reference, _inputs(ODD, dtype), ulps=ULPS)


@pytest.mark.parametrize("op", GEMMS)
def test_expert_mlp_is_right_with_every_tile(op):
    # Rows of whole 16-byte units, as TMA wants them.
    inputs = _inputs((4, 300, 96, 160, 96), torch.bfloat16)
    for config in launch.candidates(op):
        with launch.override(op, config):
            assert_matches_eager(TRITON, expert_mlp_reference, inputs, ulps=ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_mlp_drops_as_its_twin(dtype):
    op, reference = (
        partial(fn, drop=0.3, seed=torch.tensor(2**40 + 5, device="cuda")) for fn in (TRITON, expert_mlp_reference)
    )
    assert_matches_eager(op, reference, _inputs(ODD, dtype), ulps=ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_mlp_is_bitwise_equal_in_two_runs(dtype):
    inputs = _inputs(LARGE, dtype)
    first, second = (outputs_and_gradients(TRITON, inputs) for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_expert_mlp_replays_in_a_cuda_graph():
    assert_graph_replays(TRITON, _inputs(LARGE, torch.bfloat16), _inputs(LARGE, torch.bfloat16, seed=5))


def test_expert_mlp_never_synchronises():
    inputs = _inputs(ODD, torch.bfloat16)
    seed = torch.tensor(3, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    TRITON(**inputs, drop=0.1, seed=seed).sum().backward()
    with forbidden_synchronisation():
        torch.autograd.grad(TRITON(**inputs, drop=0.1, seed=seed).sum(), leaves)


def test_expert_mlp_reaches_past_2_to_the_31_elements():
    num_experts, rows, hidden = 2, 350_000, 3_200
    assert num_experts * rows * hidden > 2**31
    inputs = _inputs((num_experts, rows, 64, hidden, 64), torch.bfloat16)
    with torch.no_grad():
        y = TRITON(**inputs)
        for expert in range(num_experts):
            alone = TRITON(**{name: tensor[expert : expert + 1, ...] for name, tensor in inputs.items()})
            assert torch.equal(y[expert], alone[0])
    last = {name: tensor.detach() for name, tensor in inputs.items()}
    last["x"].requires_grad_()
    d_out = torch.zeros_like(y)
    d_out[-1, -1] = 1.0
    (d_x,) = torch.autograd.grad(TRITON(**last), [last["x"]], d_out)
    assert d_x[-1, -1].any()
    assert not d_x[0].any()
    assert not d_x[-1, :-1].any()
