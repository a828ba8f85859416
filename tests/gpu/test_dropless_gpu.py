"""Dropless slots and experts in Triton on a GPU: as in the interpreter with bfloat16, and what only a GPU can show."""

from functools import partial

import pytest
import torch

from vmoe_kernels import assign_dropless_slots, dropless_mlp, dropless_mlp_reference
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
# (T, K, E, D)
SHAPES = ((0, 2, 4, 8), (1, 1, 1, 1), (13, 3, 5, 20), (300, 2, 40, 48), (197 * 8, 2, 32, 768))
LARGE = SHAPES[-1]
ULPS = 8


def _inputs(shape, dtype, one_expert=False, seed=0):
    num_tokens, num_choices, num_experts, width = shape
    make = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=make)
    if one_expert:
        scores[:, 0] += 1.0
    gates, experts = scores.topk(num_choices)
    return {
        "x": torch.randn(num_tokens, width, generator=make).to("cuda", dtype),
        "experts": experts.to("cuda", torch.int32).contiguous(),
        "gates": gates.cuda(),
        **make_experts((num_experts, width, 4 * width, width), dtype, device="cuda", seed=seed),
    }


def _layer(op, impl, x, experts, gates, *weights):
    slots, spans = assign_dropless_slots(experts, num_experts=len(weights[0]), impl=impl)
    return op(x, slots, spans, gates, *weights)


OPS = (
    partial(_layer, partial(dropless_mlp, impl="triton"), "triton"),
    partial(_layer, dropless_mlp_reference, "reference"),
)


# In the last, experts fill their tiles.
@pytest.mark.parametrize("shape", [*SHAPES, (128, 2, 2, 8)], ids=str)
@pytest.mark.parametrize("tile", [128, 256])
def test_slots_equal_eager(shape, tile):
    inputs = _inputs(shape, torch.float32)
    settings = {"num_experts": shape[2], "group_size": 7, "tile": tile}
    got = assign_dropless_slots(inputs["experts"], **settings, impl="triton")
    want = assign_dropless_slots(inputs["experts"], **settings, impl="reference")
    assert all(torch.equal(*pair) for pair in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("one_expert", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mlp_matches_eager(shape, one_expert, dtype):
    with poisoned_memory():
        assert_matches_eager(*OPS, _inputs(shape, dtype, one_expert), ulps=ULPS)


def test_mlp_is_deterministic_and_waits_for_nothing():
    inputs = _inputs(LARGE, torch.bfloat16)
    d_output = torch.randn(LARGE[0], LARGE[3], device="cuda", dtype=torch.bfloat16)
    want = outputs_and_gradients(OPS[0], inputs, d_output)
    with forbidden_synchronisation():
        got = outputs_and_gradients(OPS[0], inputs, d_output)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_mlp_replays_in_a_graph_with_other_routing():
    assert_graph_replays(
        OPS[0], _inputs(LARGE, torch.bfloat16), _inputs(LARGE, torch.bfloat16, one_expert=True, seed=1)
    )
