"""Routing against the original: kept choices, combine weights, what is dispatched and combined."""

import pytest
import torch

import vmoe_kernels as vk
from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_kernels.routing.router_op import top_experts

CASES = golden_cases("routing", lambda config: "capacity" in config)
FAILS = golden_cases("routing", lambda config: "capacity" not in config)


def _routed(case: str, impl: str):
    config = manifest("routing")[case]["config"]
    arrays = {name: torch.from_numpy(array) for name, array in golden_arrays("routing", case).items()}
    _, tokens, num_experts = arrays["gates"].shape
    flat = arrays["gates"].reshape(-1, num_experts)
    experts = top_experts(flat, config["num_selected_experts"])
    gates = flat.gather(1, experts)
    slots = vk.assign_slots(
        experts.to(torch.int32),
        gates,
        num_experts=num_experts,
        group_size=tokens,
        capacity=config["capacity"],
        batch_priority=config["batch_priority"],
        impl=impl,
    )
    return config, arrays, experts, gates, slots


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_routing_equals_original(case, impl):
    config, arrays, experts, gates, slots = _routed(case, impl)
    nan = "nan" in case
    groups, tokens, num_experts = arrays["gates"].shape
    num_selected, capacity = config["num_selected_experts"], config["capacity"]
    want = arrays["indices"].reshape(-1, num_selected, 2)
    assert (
        vk.compute_capacity(
            tokens,
            num_experts,
            config["capacity_factor"],
            num_selected_experts=num_selected,
            rounding=config["capacity_ceil_or_round"],
            multiple_of=config["capacity_multiple_of"],
        )
        == capacity
    )
    torch.testing.assert_close(
        gates, arrays["combine_weights"].reshape(-1, num_selected), rtol=0, atol=0, equal_nan=True
    )
    if not nan:
        assert torch.equal(experts, want[..., 0].long())
        kept = want[..., 1] < capacity
        assert torch.equal(slots >= 0, kept)
        # Slots are the original's places, in the (E, G * C) layout.
        group = (torch.arange(groups * tokens) // tokens).unsqueeze(1)
        rows = want[..., 0] * (groups * capacity) + group * capacity + want[..., 1]
        assert torch.equal(slots[kept], rows.to(torch.int32)[kept])

    data = arrays["data"].reshape(groups * tokens, -1)
    num_rows = num_experts * groups * capacity
    buffer = vk.dispatch(data, slots, num_rows, impl=impl)
    # The original permutes the groups of its buffer when E divides G, and the largest buffers were not kept.
    if groups % num_experts and "dispatched" in arrays:
        assert torch.equal(buffer.view(num_experts, groups * capacity, -1), arrays["dispatched"])
    if "combined" not in arrays:
        return
    scale = 1.0 + torch.arange(num_experts).repeat_interleave(groups * capacity).unsqueeze(1)
    combined = vk.combine(buffer * scale + 0.5, slots, gates, impl=impl)
    want = arrays["combined"].view(groups * tokens, -1)
    assert torch.equal(combined.isnan(), want.isnan())
    assert relative_error(combined.nan_to_num(), want.nan_to_num()) <= 1e-6


@pytest.mark.parametrize("case", FAILS)
def test_capacity_below_one_slot_is_an_error(case):
    config = manifest("routing")[case]["config"]
    with pytest.raises(ValueError, match=r"capacity must be at least 1 slot, got 0 from num_tokens="):
        vk.compute_capacity(
            config["S"],
            config["E"],
            config["capacity_factor"],
            num_selected_experts=config["num_selected_experts"],
            rounding=config["capacity_ceil_or_round"],
            multiple_of=config["capacity_multiple_of"],
        )
