"""Which parameters decay, which Muon leaves to its fallback, and the learning rate by update."""

from dataclasses import replace

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


def test_kernels_decay_is_the_originals_by_name(tiny):
    kwargs = {"class_token": False, "global_pool": "map", "representation_size": True, "depth": 2}
    model = build_model(replace(tiny.model, kwargs={**tiny.model.kwargs, **kwargs}), 10)
    groups = groups_by_name(model, build_optimizer(model, OptimConfig(weight_decay=0.1, decay="kernels")))
    assert {name for name, group in groups.items() if group["weight_decay"] > 0} == {
        "patch_embed.proj.weight",
        *(f"blocks.{block}.attn.{part}.weight" for block in (0, 1) for part in ("qkv", "proj")),
        *(f"blocks.{block}.mlp.{part}.weight" for block in (0, 1) for part in ("fc1", "fc2")),
        "blocks.1.mlp.router.weight",
        *(f"attn_pool.{part}.weight" for part in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")),
        "pre_logits.0.weight",
        "head.weight",
    }
    rest = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert {"pos_embed", "attn_pool.latent", "blocks.1.mlp.fc1.bias", "norm.weight", "head.bias"} <= rest
    assert groups.keys() == dict(model.named_parameters()).keys()
    for other in ({"layer_decay": 0.5}, {"name": "muon"}):
        with pytest.raises(ValueError, match=r"optim.decay must be default with optim.layer_decay and with Muon"):
            build_optimizer(model, OptimConfig(decay="kernels", **other))


def test_muon_leaves_routers_and_vectors_to_its_fallback(tiny):
    model = build_model(tiny.model, 10)
    groups = groups_by_name(model, build_optimizer(model, OptimConfig(name="muon", fallback_lr_scale=0.5)))
    fallback = {name for name, group in groups.items() if group.get("use_fallback")}
    # The experts' biases, too, are matrices by their shape.
    assert fallback == {f"blocks.1.mlp.{name}" for name in ("router.weight", "fc1.bias", "fc2.bias")}
    assert {name for name, group in groups.items() if group.get("experts")} == {
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.weight",
    }
    config = OptimConfig(name="muon", fallback_lr_scale=0.5, muon_experts=False)
    groups = groups_by_name(model, build_optimizer(model, config))
    fallback = {name for name, group in groups.items() if group.get("use_fallback")}
    assert fallback == {name for name in groups if name.startswith("blocks.1.mlp.")}
    assert all(group["fallback_lr_scale"] == 0.5 for group in groups.values())


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


def test_schedule_refuses_a_warmup_as_long_as_the_run():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="must be shorter than its 10 updates, got 10"):
        build_schedule(optimizer, ScheduleConfig("linear", updates=10, warmup_epochs=2), 5)
