"""The slots' Triton kernels on a GPU, both designs, against the eager twin."""

import pytest
import torch

import vmoe_kernels as vk
from tests.helpers.routing import check_rows, check_slots, make_choices
from vmoe_kernels.common.launch import Config, override
from vmoe_kernels.testing import forbidden_synchronisation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = ("random", "ties", "zeros", "one_expert", "nan", "negative")
# tokens, group size, experts, selected, capacity, capacity of a smaller last group, designs
SIZES = [
    (1, 1, 1, 1, 1, 1, ("sort", "select")),
    (60, 25, 32, 2, 2, 1, ("sort", "select")),
    (25_088, 1568, 32, 2, 104, 104, ("sort", "select")),
    (20_000, 1576, 8, 1, 100, 70, ("sort", "select")),
    (3000, 8192, 256, 8, 60, 60, ("sort", "select")),
    (5000, 1, 8, 2, 1, 1, ("sort", "select")),
    (200_000, 200_000, 32, 2, 12_500, 12_500, ("sort",)),
]


def _assign(experts, gates, **options):
    return vk.assign_slots(experts, gates, impl="triton", **options)


def _cases():
    return [(size[:6], design) for size in SIZES for design in size[6]]


@pytest.mark.parametrize("batch_priority", [True, False])
@pytest.mark.parametrize("priority", ["max", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "design"), _cases())
def test_slots_keep_the_choices_of_the_twin(size, design, kind, priority, batch_priority):
    tokens, group, num_experts, selected, capacity, last = size
    experts, gates = make_choices(kind, tokens, num_experts, selected, "cuda")
    if priority == "sum":
        # Multiples of 1/1024: sums of 8 are exact in any order.
        gates = (gates * 1024).round() / 1024
    options = {
        "num_experts": num_experts,
        "group_size": group,
        "capacity": capacity,
        "last_capacity": last,
        "batch_priority": batch_priority,
        "priority": priority,
    }
    with override("slots", Config({"DESIGN": design}, num_warps=4)):
        first = check_slots(experts, gates, _assign, **options)
        assert torch.equal(first, _assign(experts, gates, **options))


@pytest.mark.parametrize("batch_priority", [True, False])
@pytest.mark.parametrize("kind", ["random", "one_expert", "ties"])
@pytest.mark.parametrize(("size", "design"), _cases())
def test_rows_hold_the_choices_whose_slots_they_are(size, design, kind, batch_priority):
    tokens, group, num_experts, selected, capacity, last = size
    experts, gates = make_choices(kind, tokens, num_experts, selected, "cuda")
    sizes = {"num_experts": num_experts, "group_size": group, "capacity": capacity, "last_capacity": last}
    with override("slots", Config({"DESIGN": design}, num_warps=4)):
        check_rows(experts, gates, **sizes, batch_priority=batch_priority)


def test_slots_never_synchronise():
    experts, gates = make_choices("random", 5000, 8, 2, "cuda")
    options = {"num_experts": 8, "group_size": 2000, "capacity": 300, "last_capacity": 100, "batch_priority": True}
    for design in ("sort", "select"):
        with override("slots", Config({"DESIGN": design}, num_warps=4)):
            _assign(experts, gates, **options)
            with forbidden_synchronisation():
                _assign(experts, gates, **options)
