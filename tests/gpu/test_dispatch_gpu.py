"""Dispatch in Triton on a GPU: the interpreter's checks with bfloat16, and what only a GPU can show."""

from functools import partial

import pytest
import torch

from vmoe_kernels import dispatch, dispatch_reference
from vmoe_kernels.testing import (
    ROUTED_SHAPES,
    ROUTINGS,
    assert_graph_replays,
    assert_matches_eager,
    forbidden_synchronisation,
    make_routed,
    outputs_and_gradients,
    poisoned_memory,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRITON = partial(dispatch, impl="triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD = (13, 3, 5, 4, 48)
# 128 images in one group at the paper's capacity factor.
LARGE = (25_088, 2, 32, 1_648, 768)


def _inputs(routing, shape, dtype, seed=0):
    made = make_routed(routing, shape, dtype, device="cuda", seed=seed)
    return {"x": made["x"], "slots": made["slots"], "num_rows": len(made["buffer"])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [*ROUTED_SHAPES, LARGE], ids=str)
def test_dispatch_matches_eager(shape, routing, dtype):
    inputs = _inputs(routing, shape, dtype)
    assert_matches_eager(TRITON, dispatch_reference, inputs)
    assert torch.equal(TRITON(**inputs), dispatch_reference(**inputs))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_writes_every_element(routing):
    with poisoned_memory():
        assert torch.empty(3, device="cuda").isnan().all()
        assert_matches_eager(TRITON, dispatch_reference, _inputs(routing, ODD, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_is_bitwise_equal_in_two_runs(dtype):
    inputs = _inputs("random", LARGE, dtype)
    first, second = (outputs_and_gradients(TRITON, inputs) for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_dispatch_replays_in_a_cuda_graph():
    assert_graph_replays(
        TRITON, _inputs("random", LARGE, torch.bfloat16), _inputs("random", LARGE, torch.bfloat16, seed=5)
    )


def test_dispatch_never_waits_for_the_gpu():
    inputs = _inputs("random", LARGE, torch.bfloat16)
    warm = outputs_and_gradients(TRITON, inputs)
    d_output = torch.ones_like(warm["output"])
    with forbidden_synchronisation():
        outputs_and_gradients(TRITON, inputs, d_output)


def test_dispatch_takes_more_than_2_to_the_31_elements(needs_free_memory):
    needs_free_memory(12)
    num_rows = 2**31 // 768 + 10
    x = torch.randn(3, 768, device="cuda", dtype=torch.bfloat16)
    slots = torch.tensor([[num_rows - 1], [0], [num_rows - 5]], device="cuda", dtype=torch.int32)
    buffer = TRITON(x, slots, num_rows)
    assert buffer.numel() > 2**31
    assert torch.equal(buffer[slots[:, 0].long()], x)
    assert buffer.count_nonzero() == x.count_nonzero()
    assert torch.equal(torch.ops.vmoe.dispatch_backward(buffer, slots), x)
