"""Dispatch in Triton against its eager twin, in the interpreter."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from vmoe_kernels import dispatch, dispatch_reference
from vmoe_kernels.common import launch
from vmoe_kernels.rows.dispatch_op import choice_of_row
from vmoe_kernels.rows.triton_move import choice_of_row_triton, dispatch_backward_triton, dispatch_triton
from vmoe_kernels.testing import (
    ROUTED_SHAPES,
    ROUTINGS,
    assert_compiles_and_exports,
    assert_matches_eager,
    make_routed,
    outputs_and_gradients,
    poisoned_memory,
)

TRITON = partial(dispatch, impl="triton")
ODD = (13, 3, 5, 4, 48)


def _inputs(routing, shape, dtype=torch.float32):
    made = make_routed(routing, shape, dtype)
    return {"x": made["x"], "slots": made["slots"], "num_rows": len(made["buffer"])}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", ROUTED_SHAPES, ids=str)
def test_choice_of_row_inverts_slots(shape, routing):
    made = make_routed(routing, shape, torch.float32)
    num_rows = len(made["buffer"])
    marks = torch.full_like(made["gates"], torch.nan)
    choices = choice_of_row_triton(made["slots"], num_rows, zero_dropped=marks)
    assert choices.dtype == torch.int32
    assert torch.equal(choices.long(), choice_of_row(made["slots"], num_rows))
    assert torch.equal(marks == 0, made["slots"] < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", ROUTED_SHAPES, ids=str)
def test_dispatch_matches_eager(shape, routing, dtype):
    inputs = _inputs(routing, shape, dtype)
    assert_matches_eager(TRITON, dispatch_reference, inputs)
    assert torch.equal(TRITON(**inputs), dispatch_reference(**inputs))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_writes_every_element(routing):
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert_matches_eager(TRITON, dispatch_reference, _inputs(routing, ODD))


def test_dispatch_copies_nan_only_where_it_is():
    inputs = _inputs("random", ODD)
    inputs["x"][4] = torch.nan
    buffer = TRITON(**inputs)
    rows = inputs["slots"][4]
    poisoned = torch.zeros(len(buffer), dtype=torch.bool).index_fill_(0, rows[rows >= 0].long(), True)
    assert poisoned.any()
    assert torch.equal(buffer.isnan(), poisoned[:, None].expand_as(buffer))


def test_dispatch_backward_ignores_unused_rows():
    made = make_routed("random", ODD, torch.float32)
    assert made["buffer"].isnan().any()
    d_x = dispatch_backward_triton(made["buffer"], made["slots"])
    assert torch.allclose(d_x, torch.ops.vmoe.combine(made["buffer"], made["slots"], torch.ones_like(made["gates"])))
    assert d_x.isfinite().all()


def test_dispatch_takes_strided_inputs():
    inputs = _inputs("random", ODD)
    strided = {
        "x": inputs["x"].t().contiguous().t(),
        "slots": inputs["slots"].t().contiguous().t(),
        "num_rows": inputs["num_rows"],
    }
    assert not strided["x"].is_contiguous()
    assert torch.equal(TRITON(**strided), dispatch_reference(**inputs))
    d_buffer = torch.randn(13, inputs["num_rows"]).t()
    want = dispatch_backward_triton(d_buffer.contiguous(), inputs["slots"])
    assert torch.equal(dispatch_backward_triton(d_buffer, strided["slots"]), want)


def test_dispatch_treats_a_slot_past_the_buffer_as_dropped():
    x = torch.randn(2, 8)
    past, dropped = (torch.tensor([[1], [slot]], dtype=torch.int32) for slot in (3, -1))
    assert torch.equal(dispatch_triton(x, past, 3), dispatch_triton(x, dropped, 3))
    d_buffer = torch.randn(3, 8)
    assert torch.equal(dispatch_backward_triton(d_buffer, past), dispatch_backward_triton(d_buffer, dropped))


@pytest.mark.parametrize("op", ["dispatch", "dispatch_backward"])
def test_dispatch_result_does_not_depend_on_the_tile(op):
    inputs = _inputs("random", (21, 2, 5, 8, 300))
    want = outputs_and_gradients(TRITON, inputs)
    assert len(launch.candidates(op)) > 1
    for config in launch.candidates(op):
        with launch.override(op, config):
            got = outputs_and_gradients(TRITON, inputs)
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items()), config


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_dispatch_passes_opcheck():
    inputs = _inputs("random", ODD)
    opcheck(torch.ops.vmoe.dispatch.default, (inputs["x"].requires_grad_(), inputs["slots"], inputs["num_rows"]))
    opcheck(torch.ops.vmoe.dispatch_backward.default, (torch.randn(inputs["num_rows"], 48), inputs["slots"]))


def test_dispatch_compiles_and_exports_as_one_graph():
    inputs = _inputs("random", ODD)
    assert_compiles_and_exports(TRITON, inputs)


def test_dispatch_rejects_float64():
    inputs = _inputs("random", ODD, torch.float64)
    with pytest.raises(ValueError, match="impl='triton' takes float16, bfloat16 and float32"):
        TRITON(**inputs)
    with pytest.raises(
        ValueError, match=r"x must be float16, bfloat16 or float32 for Triton kernels, got torch\.float64"
    ):
        dispatch_triton(**inputs)
    with pytest.raises(ValueError, match="d_buffer must be float16"):
        dispatch_backward_triton(torch.zeros(20, 48, dtype=torch.float64), inputs["slots"])
