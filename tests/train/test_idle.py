"""Keys that change nothing in a combination: refused, and put back where an override leaves them so."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from timm.optim import get_optimizer_info, list_optimizers

from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config, build_model
from vmoe_torch.train.config import SCHEDULES, OptimConfig, ScheduleConfig
from vmoe_torch.train.idle_keys import idle, value_at
from vmoe_torch.train.optimizer import build_optimizer, build_schedule

BASE = Config().override("data.name=fashion_mnist")


@pytest.mark.parametrize(
    "assignments",
    [
        "optim.momentum=0.5",
        "optim.betas=0.8,0.9 optim.name=sgd",
        "optim.eps=1e-3 optim.name=sgd",
        "optim.decay=kernels optim.weight_decay=0",
        "optim.head_weight_decay=3",
        "optim.fallback_lr_scale=0.5",
        "optim.muon_experts=false",
        "optim.ema_warmup=no",
        "parallel.wire=bfloat16",
        "parallel.dp=2",
        "parallel.chunks=2",
        "parallel.recompute=true",
        "parallel.materialize=true",
        "parallel.ranks_per_node=2 parallel.fsdp=true",
        "data.prefetch=4",
        "data.train_split=training",
        "data.color_jitter=0.4 data.auto_augment=rand-m5",
        "data.hflip=0 data.augment=false",
        "data.auto_augment=rand-m5 data.augment=false",
        "data.mixup_mode=pair",
        'data.kwargs={"side":64}',
        "data.distort=0.5",
        "data.distort=0.5 data.augment=false data.name=typefaces data.root=FONTS",
        "data.hflip=0 data.name=typefaces data.root=FONTS",
        "data.auto_augment=rand-m5 data.name=typefaces data.root=FONTS",
        "data.exif=true data.name=typefaces data.root=FONTS",
        "model.drop_head=true",
        "model.pretrained=true model.checkpoint=run",
        "schedule.epochs=3 schedule.updates=7",
        "schedule.warmup_epochs=2 schedule.warmup_updates=7",
        "schedule.warmup_epochs=2 schedule.name=none",
        "schedule.warmup_lr=0.1",
        "schedule.warmup_prefix=true",
        "schedule.warmup_prefix=true schedule.name=linear schedule.warmup_epochs=1",
        "schedule.min_lr=1e-5 schedule.name=step",
        "schedule.decay_epochs=3",
        "schedule.decay_rate=0.5",
        "alarms.loss_window=9 alarms.loss_spike=null",
        "alarms.find_not_finite=false alarms.stop_not_finite=false",
    ],
)
def test_key_that_changes_nothing_is_refused(assignments):
    config = BASE.override(*assignments.split())
    key = assignments.partition("=")[0]
    with pytest.raises(ValueError, match=f"^{key} must be .*, its default, with"):
        config.check()
    # The order of the assignments changes nothing.
    assert BASE.override(*reversed(assignments.split())) == config


def test_default_that_was_asked_for_is_refused_too():
    config = BASE.override("optim.momentum=0.9")
    config.check()
    with pytest.raises(ValueError, match=r"^optim\.momentum must be left out with optim.name=adamw, which has none"):
        config.check(given={"optim.momentum"})


def test_what_an_override_leaves_without_effect_goes_back_to_its_default():
    recipe = load_recipe("fashion_mnist")
    for assignment, keys in (
        ("data.augment=false", ("data.scale", "data.ratio")),
        ("schedule.name=none", ("schedule.warmup_epochs",)),
    ):
        changed = recipe.override(assignment)
        changed.check()
        for key in keys:
            assert value_at(recipe, key) != value_at(Config(), key) == value_at(changed, key)
    # What was there without effect is not swept away by an override that has nothing to do with it.
    with pytest.raises(ValueError, match=r"optim\.momentum must be 0\.9"):
        recipe.override("optim.momentum=0.5").override("run.seed=1").check()


def test_effects_of_optimisers_are_as_timm_says():
    for name in list_optimizers():
        found, info = idle(BASE.override(f"optim.name={name}")), get_optimizer_info(name)
        assert ("optim.momentum" in found, "optim.betas" in found, "optim.eps" in found) == (
            not info.has_momentum,
            not info.has_betas,
            not info.has_eps,
        )


def rates(config, updates=20):
    """Learning rates of a run of two epochs of ten updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = build_schedule(optimizer, config, updates // 2)
    found = []
    for update in range(updates):
        if schedule is not None:
            schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_uses_every_key_that_is_not_idle(name):
    start = ScheduleConfig(name, epochs=2, warmup_epochs=0.0 if name == "none" else 0.5, decay_epochs=0.5)
    values = {"warmup_epochs": 1.0, "warmup_updates": 3, "warmup_prefix": True, "warmup_lr": 0.3, "min_lr": 0.2}
    values |= {"decay_epochs": 0.3, "decay_rate": 0.7, "updates": 12}
    without = idle(replace(BASE, schedule=start))
    for key, value in values.items():
        if name == "none" and key == "updates":
            continue
        same = rates(replace(start, **{key: value})) == rates(start)
        keeps_rate = name in ("step", "constant") and key == "updates"
        assert same == (f"schedule.{key}" in without or keeps_rate), key


def test_layer_decay_holds_without_a_schedule(tiny):
    optimizer = build_optimizer(build_model(tiny.model, 10), OptimConfig(lr=0.1, layer_decay=0.5))
    assert build_schedule(optimizer, ScheduleConfig("none"), 10) is None
    found = {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups}
    assert len(found) > 2
    for scale, rate in found:
        assert rate == pytest.approx(0.1 * scale)


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum' installed")
@pytest.mark.parametrize("name", list_optimizers())
def test_optimiser_steps_or_is_refused(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    library = {"bnb": "bitsandbytes", "fus": "apex"}.get(name[:3])
    lacking = library is not None and importlib.util.find_spec(library) is None
    if lacking or get_optimizer_info(name).second_order:
        with pytest.raises(ValueError, match=r"^optim"):
            build_optimizer(model, OptimConfig(name))
        return
    optimizer = build_optimizer(model, OptimConfig(name))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def test_optimisers_that_need_more_are_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"optim\.name must be an optimiser that needs no second derivative, got 'ada"):
        build_optimizer(model, OptimConfig("adahessian"))
    with pytest.raises(ValueError, match=r"optim\.name must be .*, got 'adamv'; did you mean adam or"):
        build_optimizer(model, OptimConfig("adamv"))
