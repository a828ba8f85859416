"""timm's optimisers and schedules, with what a V-MoE needs of them."""

from functools import partial
from typing import Any

import timm
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from vmoe_torch.control import moe_layers
from vmoe_torch.train.config import OptimConfig, ScheduleConfig
from vmoe_torch.train.muon import create_muon
from vmoe_torch.train.rules import near


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser over the model's parameters, decaying those that `config.decay` says.

    Raises:
        ValueError: if timm has no such optimiser, or it does not take a value.
    """
    name = config.name.lower()
    if name not in list_optimizers():
        hint = near(name, list_optimizers())
        raise ValueError(f"optim.name must be one of timm's optimisers, got {config.name!r}{hint}")
    if get_optimizer_info(name).second_order:
        raise ValueError(f"optim.name must be an optimiser that needs no second derivative, got {config.name!r}")
    options = {}
    if config.betas is not None:
        options["betas"] = config.betas
    if config.eps is not None:
        options["eps"] = config.eps
    create = create_optimizer_v2
    if "muon" in name:
        create = create_muon
        if not config.muon_experts:
            options["fallback_list"] = tuple(f"{layer}.fc?.*" for layer in moe_layers(model))
        # Only where it is asked for: older releases of timm have none.
        if config.fallback_lr_scale != 1.0:
            options["fallback_lr_scale"] = config.fallback_lr_scale
    if config.decay == "kernels":
        if config.layer_decay is not None or "muon" in name:
            raise ValueError(f"optim.decay must be default with optim.layer_decay and with Muon, got {config.decay!r}")
        head = config.weight_decay if config.head_weight_decay is None else config.head_weight_decay
        options["param_group_fn"] = partial(_kernels_decay, weight_decay=config.weight_decay, head_weight_decay=head)
    try:
        return create(
            model,
            opt=name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **options,
        )
    # Some need a library that is not there, a GPU, or other values.
    except Exception as error:
        raise ValueError(f"optim of {config.name}: {str(error) or type(error).__name__}") from error


def _kernels_decay(model: nn.Module, weight_decay: float, head_weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of what the original calls kernels, which decay, and of the rest, which do not.

    Kernels are weights of two dims or more: positions, tokens and the probe of attention pooling have other names, and
    so have the slots of a soft router, whose scale counts as one.
    """
    kernels, head, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name == "head.weight":
            head.append(parameter)
        elif (name.endswith(".weight") and parameter.ndim > 1) or name.endswith(".router.scale"):
            kernels.append(parameter)
        else:
            rest.append(parameter)
    strengths = (0.0, weight_decay, head_weight_decay)
    return [
        {"params": params, "weight_decay": strength}
        for params, strength in zip((rest, kernels, head), strengths)
        if params
    ]


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler | None:
    """The learning rate as a function of the update alone: call `step_update(update)` before each.

    Raises:
        ValueError: if the warm-up is not shorter than the run, or timm lacks the schedule.
    """
    total, warmup = config.total(updates_per_epoch), config.warmup(updates_per_epoch)
    if config.name == "none":
        # Schedules apply the scale that layer_decay gives a layer.
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return None
    if warmup >= total:
        raise ValueError(f"the schedule's warm-up must be shorter than its {total} updates, got {warmup:g}")
    linear = config.name == "linear"
    prefix = config.warmup_prefix or linear
    steps = {"decay_epochs": config.decay_epochs * updates_per_epoch} if config.name == "step" else {}
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # The power of timm's polynomial is its decay rate.
        sched="poly" if linear else config.name,
        decay_rate=1.0 if linear else config.decay_rate,
        # timm adds such a warm-up to the length.
        num_epochs=total - warmup if prefix else total,
        warmup_epochs=warmup,
        warmup_prefix=prefix,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        **steps,
        # Its epochs are our updates.
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    if scheduler is None:
        raise ValueError(f"schedule.name must be one that timm {timm.__version__} has, got {config.name!r}")
    return scheduler
