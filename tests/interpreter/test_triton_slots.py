"""The slots' Triton kernels, both designs, against the eager twin."""

import pytest
import torch
from torch.library import opcheck

import vmoe_kernels as vk
from tests.helpers.routing import check_slots, make_choices
from vmoe_kernels.common.launch import Config, override
from vmoe_kernels.routing import triton_slots
from vmoe_kernels.testing import poisoned_memory

KINDS = ("random", "ties", "zeros", "one_expert", "nan", "negative")
# tokens, group size, experts, selected, capacity, capacity of a smaller last group
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (13, 13, 5, 3, 4, 4),
    (300, 140, 5, 2, 41, 17),
    (15, 15, 32, 2, 1, 1),
    (12, 12, 20, 8, 3, 3),
    (197 * 2, 197 * 2, 8, 1, 24, 24),
]


def _assign(experts, gates, **options):
    return vk.assign_slots(experts, gates, impl="triton", **options)


def _options(size, **more):
    _, group, num_experts, _, capacity, last = size
    return {
        "num_experts": num_experts,
        "group_size": group,
        "capacity": capacity,
        "last_capacity": last,
        "batch_priority": True,
        "priority": "max",
    } | more


@pytest.fixture(params=["sort", "select"])
def design(request):
    with override("slots", Config({"DESIGN": request.param}, num_warps=4)):
        yield request.param


@pytest.mark.parametrize("priority", ["max", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_slots_keep_the_choices_of_the_twin(design, kind, priority):
    for size in SIZES[1:3]:
        experts, gates = make_choices(kind, size[0], size[2], size[3], "cpu")
        check_slots(experts, gates, _assign, **_options(size, priority=priority))


@pytest.mark.parametrize("size", SIZES)
def test_slots_of_every_size(design, size):
    experts, gates = make_choices("random", size[0], size[2], size[3], "cpu")
    for batch_priority in (False, True):
        check_slots(experts, gates, _assign, **_options(size, batch_priority=batch_priority))


@pytest.mark.parametrize("kind", ["random", "one_expert"])
def test_vanilla_slots_equal_the_twin_row_by_row(design, kind):
    for size in SIZES[:5]:
        experts, gates = make_choices(kind, size[0], size[2], size[3], "cpu")
        options = _options(size, batch_priority=False)
        assert torch.equal(_assign(experts, gates, **options), vk.assign_slots_reference(experts, gates, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_sorted_slots_equal_the_twin_row_by_row(kind):
    size = SIZES[2]
    experts, gates = make_choices(kind, size[0], size[2], size[3], "cpu")
    with override("slots", Config({"DESIGN": "sort"}, num_warps=4)):
        got = _assign(experts, gates, **_options(size))
    assert torch.equal(got, vk.assign_slots_reference(experts, gates, **_options(size)))


@pytest.mark.parametrize("capacity", [1, 7, 12, 13, 20])
def test_slots_at_the_edge_of_capacity(design, capacity):
    # 12 tokens, all for expert 1 first and expert 0 second, with one tie across the threshold of every capacity.
    experts = torch.tensor([1, 0], dtype=torch.int32).expand(12, 2).contiguous()
    gates = torch.tensor([0.5, 0.25]).expand(12, 2).contiguous()
    gates[4] = torch.tensor([0.9, 0.1])
    size = (12, 12, 3, 2, capacity, capacity)
    slots = check_slots(experts, gates, _assign, **_options(size))
    assert int((slots[:, 0] >= 0).sum()) == min(capacity, 12)
    assert slots[4].min() >= 0
    # Ties go to the lower index: the last token is the first to lose.
    assert (slots[11, 0] >= 0) == (capacity >= 12)


def test_slots_count_a_token_twice_that_chooses_an_expert_twice(design):
    experts = torch.zeros(6, 2, dtype=torch.int32)
    gates = torch.tensor([[0.1], [0.6], [0.3], [0.6], [0.2], [0.5]]).expand(6, 2).contiguous()
    for capacity in (2, 6, 9, 12):
        check_slots(experts, gates, _assign, **_options((6, 6, 1, 2, capacity, capacity)))


def test_slots_round_sums_of_half_precision_as_the_twin(design):
    experts, gates = make_choices("random", 300, 5, 2, "cpu")
    # Sums of neighbouring values of 11 bits tie only when rounded to 11 bits.
    gates = (1.0 + (gates * 8).round() / 1024).to(torch.float16)
    check_slots(experts, gates, _assign, **_options(SIZES[2], priority="sum"))


def test_slots_write_every_choice(design):
    for size in (SIZES[1], (0, 4, 3, 2, 1, 1)):
        experts, gates = make_choices("random", size[0], size[2], size[3], "cpu")
        with poisoned_memory():
            for batch_priority in (False, True):
                slots = check_slots(experts, gates, _assign, **_options(size, batch_priority=batch_priority))
                assert slots.numel() == 0 or int(slots.max()) < 2**31 - 1


def test_slots_scan_counts_over_many_blocks(monkeypatch):
    # More blocks than the scan reads at once, and several parts of experts.
    monkeypatch.setattr("vmoe_kernels.routing.triton_slots_sort._BLOCK_ROWS", 2)
    monkeypatch.setattr("vmoe_kernels.routing.triton_slots_sort._BLOCK_E", 4)
    monkeypatch.setattr("vmoe_kernels.routing.triton_slots_sort._BLOCK_N", 16)
    experts, gates = make_choices("ties", 150, 9, 2, "cpu")
    with override("slots", Config({"DESIGN": "sort"}, num_warps=4)):
        check_slots(experts, gates, _assign, **_options((150, 100, 9, 2, 15, 6)))


def test_sorted_slots_of_many_experts():
    experts, gates = make_choices("random", 70, 256, 8, "cpu")
    with override("slots", Config({"DESIGN": "sort"}, num_warps=4)):
        check_slots(experts, gates, _assign, **_options((70, 40, 256, 8, 2, 1)))


def test_slots_table_chooses_a_design_that_holds_the_group():
    device = torch.device("cpu")
    sizes = {1: "sort", 63: "sort", 64: "select", 1576: "select", 4096: "select", 4097: "sort", 200_000: "sort"}
    assert {size: triton_slots.choose_design(10**6, size, device) for size in sizes} == sizes
    # A group size beyond the tokens is a group of all tokens.
    assert triton_slots.choose_design(100, 10**6, device) == "select"


def test_slots_refuse_what_the_kernels_cannot_hold():
    ones = torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"choices per token must be at most 8 for the Triton slots, got 9"):
        _assign(torch.zeros(2, 9, dtype=torch.int32), ones, num_experts=9, capacity=1)
    with pytest.raises(ValueError, match=r"num_experts must be at most 256 for the Triton slots, got 257"):
        _assign(torch.zeros(2, 1, dtype=torch.int32), ones[:, :1], num_experts=257, capacity=1)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 rows, got 2147483648"):
        _assign(torch.zeros(2, 1, dtype=torch.int32), ones[:, :1], num_experts=1, capacity=2**31)
    with (
        override("slots", Config({"DESIGN": "select"}, num_warps=4)),
        pytest.raises(ValueError, match=r"groups of at most 4096 tokens, got 4097"),
    ):
        _assign(torch.zeros(4097, 1, dtype=torch.int32), torch.ones(4097, 1), num_experts=1, capacity=1)


def test_slots_op_passes_opcheck(design):
    experts, gates = make_choices("random", 40, 5, 2, "cpu")
    opcheck(torch.ops.vmoe.assign_slots, (experts, gates, 5, 15, 4, 3, True, "max"))


def test_slots_compile_fullgraph(design):
    experts, gates = make_choices("random", 40, 5, 2, "cpu")
    options = {"num_experts": 5, "group_size": 15, "capacity": 4, "last_capacity": 3, "batch_priority": True}
    compiled = torch.compile(_assign, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(experts, gates, **options), _assign(experts, gates, **options))
