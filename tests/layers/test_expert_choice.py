"""Expert choice against the original: which tokens every expert takes, and with what weight."""

import pytest
import torch

import vmoe_kernels as vk
import vmoe_torch
from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.analyze import ExpertsPerToken
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


def _by_slot(slots, gates, groups, capacity):
    """What was chosen as the original has it: (G, S, E, C) whether a token is in a slot, and its gate there."""
    kept = slots >= 0
    place = torch.where(kept, slots % capacity, 0).long()
    in_slot = torch.nn.functional.one_hot(place, capacity).bool() & kept.unsqueeze(-1)
    shape = (groups, -1, slots.shape[1], capacity)
    return in_slot.view(shape), torch.where(in_slot, gates.unsqueeze(-1), 0.0).view(shape)


def _check_metrics(want, in_slot, combine_weights):
    experts = in_slot.any(-1).sum(2)
    taken = torch.where(in_slot, combine_weights, torch.nan)
    found = {
        "max_selected_gate": taken.nan_to_num(-1.0).amax((1, 2, 3)),
        "min_selected_gate": taken.nan_to_num(2.0).amin((1, 2, 3)),
        "num_experts_per_item_max": experts.amax(1),
        "num_experts_per_item_min": experts.amin(1),
    }
    for least in (1, 2, 4, 6, 8):
        found[f"ratio_processed_items_by_at_least_{least}_experts"] = (experts >= least).float().mean(1)
    metrics = [name.removeprefix("metrics/") for name in want if name.startswith("metrics/")]
    assert len(metrics) >= 6
    for name in metrics:
        if name != "auxiliary_loss":
            assert relative_error(found[name], want[f"metrics/{name}"]) <= 1e-6, name
    # The report of `vmoe analyze` counts the same.
    counted = ExpertsPerToken(torch.bincount(experts.flatten(), minlength=in_slot.shape[2] + 1))
    assert counted.lowest == want["metrics/num_experts_per_item_min"].min()
    assert counted.highest == want["metrics/num_experts_per_item_max"].max()
    for least in (1, 2):
        ratio = want[f"metrics/ratio_processed_items_by_at_least_{least}_experts"].mean()
        assert counted.at_least(least) == pytest.approx(ratio.item(), rel=1e-6)
    assert counted.mean == pytest.approx(in_slot.float().sum((2, 3)).mean().item(), rel=1e-6)


@pytest.mark.parametrize("case", golden_cases("expert_choice", lambda config: "kind" in config))
def test_every_slot_and_metric_is_the_originals(case):
    config = manifest("expert_choice")[case]["config"]
    want = {name: torch.from_numpy(array) for name, array in golden_arrays("expert_choice", case).items()}
    groups, tokens, num_experts = want["gates"].shape
    gates = want["gates"].view(-1, num_experts)
    slots = expert_choice(gates, tokens, config["capacity"], config["capacity"])
    in_slot, combine_weights = _by_slot(slots, gates, groups, config["capacity"])
    # The best token in the first slot: the order is the original's, too.
    assert torch.equal(in_slot, want["dispatch_weights"])
    assert torch.equal(combine_weights, want["combine_weights"])
    assert torch.equal(in_slot.int().argmax(1).to(torch.int32), want["top_items"])
    _check_metrics(want, in_slot, combine_weights)


def test_router_equals_original():
    want = {name: torch.from_numpy(array) for name, array in golden_arrays("expert_choice", "router_0").items()}
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", group_size=1, capacity_multiple_of=None)
    layer.router.weight.data.copy_(want["kernel"].t())
    # In training, too: the case has noise, times 0.
    layer.router.noise_std = manifest("expert_choice")["router_0"]["config"]["noise_std"]
    for training in (False, True):
        layer.train(training)(want["inputs"])
        in_slot, combine_weights = _by_slot(layer.record.slots, layer.record.gates, 2, 7)
        assert torch.equal(in_slot, want["dispatch_weights"])
        assert relative_error(combine_weights, want["combine_weights"]) <= 1e-6
        _check_metrics(want, in_slot, combine_weights)
        assert vmoe_torch.auxiliary_loss(torch.nn.Sequential(layer)) == want["metrics/auxiliary_loss"] == 0


def test_noise_is_that_of_the_paper():
    """1 / E per logit; with a router of zeros, logits are noise: what softmax leaves of their logarithms."""
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", group_size="image", capacity_factor=1.0)
    layer.router.weight.data.zero_()
    layer.train()(torch.randn(20, 100, 16))
    logs = layer.record.gates.log()
    assert (logs - logs.mean(1, keepdim=True)).std().item() == pytest.approx((3 / 4) ** 0.5 / 4, rel=0.05)


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


def test_k_and_priority_cannot_be_set():
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice")
    for changes in ({"num_selected_experts": 3}, {"batch_priority": False}, {"priority": "sum"}):
        with pytest.raises(ValueError, match=r"capacity_factor, eval_capacity_factor.*experts choose their tokens"):
            vmoe_torch.set_routing(layer, **changes)
    vmoe_torch.set_routing(layer, capacity_factor=0.5)
    assert layer.eval_capacity_factor == 0.5
    # K, which it does not use, may be left out.
    single = MoeMlp(16, 8, num_experts=1, router="expert_choice", capacity_factor=1.0)
    assert single(torch.ones(1, 4, 16)).shape == (1, 4, 16)


def test_capacity_above_the_group_is_an_error():
    layer = MoeMlp(16, 8, num_experts=4, router="expert_choice", capacity_factor=8.0)
    with pytest.raises(ValueError, match="capacity must be at most the 16 tokens of a group, got 32"):
        layer(torch.randn(2, 8, 16))
