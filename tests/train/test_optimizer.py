"""Which parameters decay, which Muon leaves to its fallback, and the learning rate by update."""

import pytest
import torch

from vmoe_torch.train import build_model
from vmoe_torch.train.config import OptimConfig, ScheduleConfig
from vmoe_torch.train.optimizer import build_optimizer, build_schedule


def groups_by_name(model, optimizer):
    """The parameter group of every parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_only_weights_decay(tiny):
    model = build_model(tiny.model, 10)
    groups = groups_by_name(model, build_optimizer(model, OptimConfig(weight_decay=0.1)))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        decays = name.endswith("weight") and "norm" not in name
        assert (group["weight_decay"] > 0) == decays, name


def test_muon_leaves_experts_and_routers_to_its_fallback(tiny):
    model = build_model(tiny.model, 10)
    groups = groups_by_name(model, build_optimizer(model, OptimConfig(name="muon")))
    fallback = {name for name, group in groups.items() if group.get("use_fallback")}
    assert {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "blocks.1.mlp.router.weight"} <= fallback
    assert not {"blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"} & fallback


def test_layer_decay_scales_the_first_block_most(tiny):
    model = build_model(tiny.model, 10)
    groups = groups_by_name(model, build_optimizer(model, OptimConfig(layer_decay=0.5)))
    first, second, head = (
        groups[name]["lr_scale"] for name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "head.weight")
    )
    assert first < second < head == 1


def test_schedule_depends_on_the_update_alone():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    config = ScheduleConfig(epochs=2, warmup_epochs=0.5)
    schedule = build_schedule(optimizer, config, updates_per_epoch=10)

    def rate(update):
        schedule.step_update(update)
        return optimizer.param_groups[0]["lr"]

    rates = [rate(update) for update in range(20)]
    assert rates[0] == 0
    assert rates[4] == pytest.approx(0.8)
    assert rates[10] == pytest.approx(0.5)
    assert rates[19] < 0.01
    assert [rate(update) for update in (19, 4, 10)] == [rates[19], rates[4], rates[10]]


def test_schedule_none_leaves_the_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    assert build_schedule(optimizer, ScheduleConfig(name="none"), 10) is None
    assert optimizer.param_groups[0]["lr"] == 1.0
