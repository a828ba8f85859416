"""timm's optimisers and schedules, with what a V-MoE needs of them."""

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from vmoe_torch.train.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser over the model's parameters; biases, norms and `model.no_weight_decay()` do not decay.

    Raises:
        ValueError: if timm has no such optimiser, or it does not take a value.
    """
    name = config.name.lower()
    if name not in list_optimizers():
        raise ValueError(f"optim.name must be one of timm's optimisers, got {config.name!r}")
    options = {}
    if config.betas is not None:
        options["betas"] = config.betas
    if config.eps is not None:
        options["eps"] = config.eps
    if "muon" in name:
        options["fallback_list"] = _muon_fallback(model)
    try:
        return create_optimizer_v2(
            model,
            opt=name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim of {config.name}: {error}") from error


def _muon_fallback(model: nn.Module) -> tuple[str, ...]:
    """Experts and routers of the MoE layers, by exact name; the dense MLPs stay with Muon."""
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if name.endswith("router.weight") or (parameter.ndim == 3 and ".mlp." in f".{name}")
    )


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler | None:
    """The learning rate as a function of the update alone: call `step_update(update)` before each."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        decay_epochs=config.decay_epochs if config.name == "step" else None,
        decay_rate=config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
