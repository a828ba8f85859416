"""Expert choice against the original: which tokens every expert takes, and with what weight."""

import pytest
import torch

import vmoe_kernels as vk
import vmoe_torch
from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.layers import MoeMlp, expert_choice


@pytest.mark.parametrize("case", golden_cases("expert_choice", lambda config: "kind" in config))
def test_choice_equals_original(case):
    config = manifest("expert_choice")[case]["config"]
    want = {name: torch.from_numpy(array) for name, array in golden_arrays("expert_choice", case).items()}
    groups, tokens, num_experts = want["gates"].shape
    capacity = config["capacity"]
    assert capacity == vk.compute_capacity(
        tokens, num_experts, config["capacity_factor"], multiple_of=config["capacity_multiple_of"]
    )
    gates = want["gates"].view(-1, num_experts)
    slots = expert_choice(gates, tokens, capacity, capacity)
    assert torch.equal((slots >= 0).view(groups, tokens, num_experts), want["dispatch_weights"].any(-1))
    data = want["data"].view(groups * tokens, -1)
    rows = num_experts * groups * capacity
    buffer = vk.dispatch(data, slots, rows)
    if groups % num_experts:
        assert torch.equal(buffer.view_as(want["dispatched"]), want["dispatched"])
    scale = 1.0 + torch.arange(num_experts).repeat_interleave(groups * capacity).unsqueeze(1)
    combined = vk.combine(buffer * scale + 0.5, slots, gates)
    assert relative_error(combined, want["combined"].view(groups * tokens, -1)) <= 1e-6


def test_router_equals_original():
    want = {name: torch.from_numpy(array) for name, array in golden_arrays("expert_choice", "router_0").items()}
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", group_size=1, capacity_multiple_of=None)
    layer.router.weight.data.copy_(want["kernel"].t())
    layer.eval()(want["inputs"])
    gates = torch.where(layer.record.slots >= 0, layer.record.gates, 0.0)
    assert relative_error(gates.view(2, 24, 4), want["combine_weights"].sum(-1)) <= 1e-6


def test_smaller_last_group_has_its_own_capacity():
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", group_size=2, capacity_factor=1.0)
    layer.eval()(torch.randn(5, 8, 16))
    kept = layer.record.slots >= 0
    assert kept.shape == (40, 4)
    # 16 and 8 tokens over 4 experts: 4 slots each, and 2 up to a multiple of 4.
    assert kept[:16].sum(0).tolist() == kept[16:32].sum(0).tolist() == kept[32:].sum(0).tolist() == [4] * 4
    stats = vmoe_torch.routing_stats(torch.nn.Sequential(layer))["0"]
    assert set(stats) == {"load", "unprocessed", "gates"}
    torch.testing.assert_close(stats["load"], torch.full((4,), 0.25))


def test_training_has_noise_and_gradients():
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", noise_std=3.0)
    x = torch.randn(4, 8, 16)
    assert not torch.equal(layer(x), layer(x))
    layer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_capacity_above_the_group_is_an_error():
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", capacity_factor=8.0)
    with pytest.raises(ValueError, match="capacity must be at most the 16 tokens of a group, got 32"):
        layer(torch.randn(2, 8, 16))
