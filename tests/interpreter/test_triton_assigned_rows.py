"""Rows that name their choices: written with the slots, and used by the experts' kernels in place of inverting them."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

import vmoe_kernels as vk
from tests.helpers.routing import check_slots, make_choices
from vmoe_kernels.common.launch import Config, override
from vmoe_kernels.testing import assert_matches_eager, make_experts, poisoned_memory

# tokens, group size, experts, selected, capacity, capacity of a smaller last group
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (13, 13, 5, 3, 4, 4),
    (150, 70, 5, 2, 41, 9),
    (15, 15, 32, 2, 1, 1),
    # Far more places than tokens, and more than a program holds at once.
    (9, 4, 3, 2, 70, 70),
    (0, 4, 3, 2, 5, 5),
]


def _options(size, **more):
    _, group, num_experts, _, capacity, last = size
    return {"num_experts": num_experts, "group_size": group, "capacity": capacity, "last_capacity": last} | more


def _inverse(slots, rows: int) -> list[int]:
    """Which choice each row holds, one slot after the other."""
    held = [-1] * rows
    for choice, row in enumerate(slots.flatten().tolist()):
        if row >= 0:
            assert held[row] == -1
            held[row] = choice
    return held


@pytest.fixture(params=["sort", "select"])
def design(request):
    with override("slots", Config({"DESIGN": request.param}, num_warps=4)):
        yield request.param


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("kind", ["random", "one_expert", "ties"])
def test_rows_hold_the_choices_whose_slots_they_are(design, kind, batch_priority):
    for size in SIZES:
        experts, gates = make_choices(kind, size[0], size[2], size[3], "cpu")
        options = _options(size, batch_priority=batch_priority)
        rows = size[2] * vk.rows_per_expert(size[0], size[1], size[4], size[5])
        with poisoned_memory():
            slots, choices = vk.assign_rows(experts, gates, impl="triton", **options)
            alone = check_slots(experts, gates, partial(vk.assign_slots, impl="triton"), priority="max", **options)
        assert choices.dtype == torch.int32
        assert choices.tolist() == _inverse(slots, rows)
        assert torch.equal(slots, alone)


def test_rows_of_the_twin_are_the_inverse_too():
    for size in SIZES:
        experts, gates = make_choices("random", size[0], size[2], size[3], "cpu")
        slots, choices = vk.assign_rows(experts, gates, impl="reference", **_options(size))
        assert choices.dtype == torch.int32
        assert choices.tolist() == _inverse(slots, choices.numel())
        assert torch.equal(slots, vk.assign_slots(experts, gates, impl="reference", **_options(size)))


def test_rows_op_passes_opcheck(design):
    experts, gates = make_choices("random", 40, 5, 2, "cpu")
    opcheck(torch.ops.vmoe.assign_rows, (experts, gates, 5, 15, 4, 3, True, "max"))


def test_rows_compile_fullgraph():
    experts, gates = make_choices("random", 40, 5, 2, "cpu")
    assign = partial(vk.assign_rows, num_experts=5, group_size=15, capacity=4, batch_priority=True, impl="triton")
    compiled = torch.compile(assign, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(experts, gates), assign(experts, gates)):
        assert torch.equal(got, want)


def _routed():
    """Slots and rows of 13 tokens, some dropped, and what `moe_mlp` takes beside them."""
    experts, gates = make_choices("random", 13, 5, 3, "cpu")
    slots, choices = vk.assign_rows(experts, gates, num_experts=5, capacity=4, batch_priority=True)
    x = torch.randn(13, 20, generator=torch.Generator().manual_seed(2))
    return {"x": x, "slots": slots, "gates": gates, **make_experts((5, 20, 30, 22), torch.float32)}, choices


def test_experts_take_the_choices_of_the_rows_for_the_inverse_of_the_slots():
    inputs, choices = _routed()
    ours = partial(vk.moe_mlp, rows_per_expert=4, choices=choices, impl="triton")
    with poisoned_memory():
        assert_matches_eager(ours, partial(vk.moe_mlp_reference, rows_per_expert=4), inputs, ulps=8)
    # They are read, and nothing else is: told that all rows hold the first choice, experts see its token alone.
    first = vk.moe_mlp(**inputs, rows_per_expert=4, choices=choices.clamp(max=0), impl="triton")
    assert not torch.allclose(first, ours(**inputs))


def test_experts_refuse_choices_of_other_rows():
    inputs, choices = _routed()
    for wrong in (choices[1:], choices.long()):
        with pytest.raises(ValueError, match=r"choices must be \(E \* R,\) int32 on cpu with E=5 and R=4, got"):
            vk.moe_mlp(**inputs, rows_per_expert=4, choices=wrong)


def test_experts_with_choices_pass_opcheck_and_compile():
    inputs, choices = _routed()
    tensors = [value.requires_grad_() if value.is_floating_point() else value for value in inputs.values()]
    opcheck(torch.ops.vmoe.moe_mlp.default, (*tensors, 4, "silu", 0.0, None, True, choices), test_utils="test_schema")
    op = partial(vk.moe_mlp, rows_per_expert=4, impl="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, choices=choices), op(**inputs, choices=choices))
