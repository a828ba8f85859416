"""Combine in Triton against its eager twin, in the interpreter."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from vmoe_kernels import combine, combine_reference
from vmoe_kernels.common import launch
from vmoe_kernels.rows.triton_combine_backward import combine_backward_triton
from vmoe_kernels.rows.triton_move import combine_triton
from vmoe_kernels.testing import (
    ROUTED_SHAPES,
    ROUTINGS,
    assert_compiles_and_exports,
    assert_matches_eager,
    make_routed,
    outputs_and_gradients,
    poisoned_memory,
)

TRITON = partial(combine, impl="triton")
ODD = (13, 3, 5, 4, 48)


def _inputs(routing, shape, dtype=torch.float32):
    made = make_routed(routing, shape, dtype)
    return {name: made[name] for name in ("buffer", "slots", "gates")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", ROUTED_SHAPES, ids=str)
def test_combine_matches_eager(shape, routing, dtype):
    assert_matches_eager(TRITON, combine_reference, _inputs(routing, shape, dtype))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_combine_writes_every_element(routing):
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert_matches_eager(TRITON, combine_reference, _inputs(routing, ODD))


def test_combine_gives_nothing_to_what_was_dropped():
    inputs = _inputs("random", ODD)
    unused = inputs["buffer"].isnan().all(1)
    dropped = inputs["slots"] < 0
    assert unused.any()
    assert dropped.any()
    got = outputs_and_gradients(TRITON, inputs)
    assert torch.equal((got["d_buffer"] == 0).all(1), unused)
    assert torch.equal(got["d_gates"] == 0, dropped)
    nothing = outputs_and_gradients(TRITON, _inputs("dropped", ODD))
    assert not any(tensor.any() for tensor in nothing.values())


# The interpreter computes in NumPy, which warns of 0 times infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_combine_shows_a_gate_that_is_not_finite(value):
    inputs = _inputs("random", ODD)
    dropped = (inputs["slots"] < 0).nonzero()[0]
    kept = (inputs["slots"] >= 0).nonzero()[-1]
    assert dropped[0] != kept[0]
    for place in (dropped, kept):
        inputs["gates"][tuple(place)] = value
    y = TRITON(**inputs)
    assert y[dropped[0]].isnan().all()
    assert not y[kept[0]].isfinite().any()
    assert_matches_eager(TRITON, combine_reference, inputs)


def test_combine_takes_half_precision_gates():
    inputs = _inputs("random", ODD, torch.float16)
    inputs["gates"] = inputs["gates"].half()
    assert_matches_eager(TRITON, combine_reference, inputs)


def test_combine_takes_strided_inputs():
    inputs = _inputs("random", ODD)
    strided = {name: tensor.t().contiguous().t() for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    got, want = outputs_and_gradients(TRITON, strided), outputs_and_gradients(TRITON, inputs)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_combine_treats_a_slot_past_the_buffer_as_dropped():
    buffer, gates = torch.randn(3, 8), torch.rand(2, 1)
    past, dropped = (torch.tensor([[1], [slot]], dtype=torch.int32) for slot in (3, -1))
    assert torch.equal(combine_triton(buffer, past, gates), combine_triton(buffer, dropped, gates))
    d_y = torch.randn(2, 8)
    with poisoned_memory():
        got, want = (combine_backward_triton(d_y, buffer, slots, gates) for slots in (past, dropped))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_combine_result_does_not_depend_on_the_tile():
    inputs = _inputs("random", (21, 2, 5, 8, 300))
    want = outputs_and_gradients(TRITON, inputs)
    assert len(launch.candidates("combine")) > 1
    for config in launch.candidates("combine"):
        with launch.override("combine", config):
            assert torch.equal(TRITON(**inputs), want["output"]), config


def test_combine_backward_is_right_with_every_tile():
    inputs = _inputs("random", (21, 2, 5, 8, 300))
    assert len(launch.candidates("combine_backward")) > 1
    for config in launch.candidates("combine_backward"):
        with launch.override("combine_backward", config):
            assert_matches_eager(TRITON, combine_reference, inputs)


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_combine_passes_opcheck():
    inputs = _inputs("random", ODD)
    buffer, slots, gates = inputs["buffer"].nan_to_num(), inputs["slots"], inputs["gates"]
    opcheck(torch.ops.vmoe.combine_backward.default, (torch.randn(13, 48), buffer, slots, gates))
    opcheck(torch.ops.vmoe.combine.default, (buffer.requires_grad_(), slots, gates.requires_grad_()))


def test_combine_compiles_and_exports_as_one_graph():
    inputs = _inputs("random", ODD)
    assert_compiles_and_exports(TRITON, inputs)


def test_combine_rejects_float64():
    inputs = _inputs("random", ODD, torch.float64)
    with pytest.raises(ValueError, match="impl='triton' takes float16, bfloat16 and float32"):
        TRITON(**inputs)
    with pytest.raises(ValueError, match=r"buffer must be float16, bfloat16 or float32 .* got torch\.float64"):
        combine_triton(**inputs)
    with pytest.raises(ValueError, match="buffer must be float16"):
        combine_backward_triton(torch.zeros(13, 48, dtype=torch.float64), **inputs)
