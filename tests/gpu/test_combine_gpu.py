"""Combine in Triton on a GPU: the interpreter's checks with bfloat16, and what only a GPU can show."""

from functools import partial

import pytest
import torch

from vmoe_kernels import combine, combine_reference
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
TRITON = partial(combine, impl="triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD = (13, 3, 5, 4, 48)
# 128 images in one group at the paper's capacity factor.
LARGE = (25_088, 2, 32, 1_648, 768)


def _inputs(routing, shape, dtype, seed=0):
    made = make_routed(routing, shape, dtype, device="cuda", seed=seed)
    return {name: made[name] for name in ("buffer", "slots", "gates")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [*ROUTED_SHAPES, LARGE], ids=str)
def test_combine_matches_eager(shape, routing, dtype):
    assert_matches_eager(TRITON, combine_reference, _inputs(routing, shape, dtype))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_combine_writes_every_element(routing):
    with poisoned_memory():
        assert torch.empty(3, device="cuda").isnan().all()
        assert_matches_eager(TRITON, combine_reference, _inputs(routing, ODD, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_is_bitwise_equal_in_two_runs(dtype):
    inputs = _inputs("random", LARGE, dtype)
    first, second = (outputs_and_gradients(TRITON, inputs) for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_combine_replays_in_a_cuda_graph():
    assert_graph_replays(
        TRITON, _inputs("random", LARGE, torch.bfloat16), _inputs("random", LARGE, torch.bfloat16, seed=5)
    )


def test_combine_never_waits_for_the_gpu():
    inputs = _inputs("random", LARGE, torch.bfloat16)
    warm = outputs_and_gradients(TRITON, inputs)
    d_output = torch.ones_like(warm["output"])
    with forbidden_synchronisation():
        outputs_and_gradients(TRITON, inputs, d_output)


def test_combine_takes_more_than_2_to_the_31_elements(needs_free_memory):
    needs_free_memory(16)
    num_rows = 2**31 // 768 + 10
    buffer = torch.zeros(num_rows, 768, device="cuda", dtype=torch.bfloat16)
    assert buffer.numel() > 2**31
    slots = torch.tensor([[num_rows - 1], [0], [num_rows - 5]], device="cuda", dtype=torch.int32)
    rows = slots[:, 0].long()
    buffer[rows] = torch.randn(3, 768, device="cuda", dtype=torch.bfloat16)
    gates = torch.ones(3, 1, device="cuda")
    assert torch.equal(TRITON(buffer, slots, gates), buffer[rows])
    d_y = torch.randn(3, 768, device="cuda", dtype=torch.bfloat16)
    d_buffer, d_gates = torch.ops.vmoe.combine_backward(d_y, buffer, slots, gates)
    assert torch.equal(d_buffer[rows], d_y)
    assert d_buffer.count_nonzero() == d_y.count_nonzero()
    torch.testing.assert_close(d_gates[:, 0], (d_y.float() * buffer[rows].float()).sum(1), rtol=1e-4, atol=1e-4)
