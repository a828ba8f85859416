"""Keys that change nothing in a combination, and why: a run with a value of its own in one of them is refused."""

import json
from dataclasses import replace
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from vmoe_torch.data.factory import FASHION_MNIST
from vmoe_torch.data.typefaces import TYPEFACES
from vmoe_torch.data.video import VIDEO


def idle(config: Any) -> dict[str, str]:
    """The keys of a run's configuration that change nothing in it, whatever their values, each with the reason."""
    return {key: reason for is_so, reason, keys in _combinations(config) if is_so for key in keys.split()}


def value_at(config: Any, key: str) -> Any:
    """The value of a key, as "optim.lr"."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def reset(config: Any, keys: set[str]) -> Any:
    """The configuration with the defaults of these keys."""
    for key in keys:
        section, name = key.split(".")
        part = replace(getattr(config, section), **{name: value_at(type(config)(), key)})
        config = replace(config, **{section: part})
    return config


def check_idle(config: Any, given: set[str]) -> None:
    """Refuses keys that change nothing.

    Args:
        config: of a run.
        given: keys that are refused even at their defaults, as somebody asked for them.

    Raises:
        ValueError: if a key that changes nothing differs from its default or is among the given.
    """
    defaults = type(config)()
    for key, reason in idle(config).items():
        value, default = value_at(config, key), value_at(defaults, key)
        if value != default:
            raise ValueError(f"{key} must be {_shown(default)}, its default, {reason}, got {_shown(value)}")
        if key in given:
            raise ValueError(f"{key} must be left out {reason}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _combinations(config: Any) -> list[tuple[bool, str, str]]:
    """Whether a combination is there, what it is, and the keys that change nothing in it."""
    model, data, optim, schedule = config.model, config.data, config.optim, config.schedule
    parallel, alarms = config.parallel, config.alarms
    known = optim.name.lower() in list_optimizers()
    takes = get_optimizer_info(optim.name.lower()) if known else None
    lacks = f"with optim.name={optim.name}, which has none"
    name = schedule.name
    by_schedule = f"with schedule.name={name}"
    warm = name != "none" and schedule.warmup(1) > 0
    randaugment = data.auto_augment is not None and "3a" not in data.auto_augment
    return [
        (not model.pretrained and model.checkpoint is None, "without weights to begin with", "model.drop_head"),
        (model.checkpoint is not None, "with model.checkpoint, whose weights replace it", "model.pretrained"),
        (data.name == FASHION_MNIST, "with data.name=fashion_mnist", "data.train_split data.val_split"),
        (data.name != TYPEFACES, f"with data.name={data.name}", "data.kwargs data.distort"),
        (
            data.name == TYPEFACES,
            "with data.name=typefaces, which has distortions of its own",
            "data.scale data.ratio data.hflip data.color_jitter data.auto_augment data.random_erasing",
        ),
        (
            data.name in (FASHION_MNIST, TYPEFACES),
            f"with data.name={data.name}, which reads no image files",
            "data.exif data.max_broken",
        ),
        (data.name == VIDEO, "with data.name=video, whose files are always turned as they say", "data.exif"),
        (data.name != VIDEO, f"with data.name={data.name}", "data.frames data.frame_stride data.fps"),
        (data.fps is not None, "with data.fps, which counts instead", "data.frame_stride"),
        (data.workers == 0, "with data.workers=0", "data.prefetch"),
        (
            not data.augment,
            "with data.augment=false",
            "data.scale data.ratio data.hflip data.color_jitter data.auto_augment data.random_erasing data.distort",
        ),
        # timm jitters colours beside "3a" only.
        (randaugment, "with data.auto_augment, which does it itself", "data.color_jitter"),
        (data.mixup == 0 and data.cutmix == 0, "without data.mixup and data.cutmix", "data.mixup_mode"),
        (known and not takes.has_momentum, lacks, "optim.momentum"),
        (known and not takes.has_betas, lacks, "optim.betas"),
        (known and not takes.has_eps, lacks, "optim.eps"),
        ("muon" not in optim.name.lower(), lacks, "optim.fallback_lr_scale optim.muon_experts"),
        (optim.weight_decay == 0, "with optim.weight_decay=0", "optim.decay"),
        (optim.decay != "kernels", f"with optim.decay={optim.decay}", "optim.head_weight_decay"),
        (optim.ema_decay is None, "without optim.ema_decay", "optim.ema_warmup"),
        (schedule.updates is not None, "with schedule.updates, which counts instead", "schedule.epochs"),
        (
            schedule.warmup_updates is not None,
            "with schedule.warmup_updates, which counts instead",
            "schedule.warmup_epochs",
        ),
        (name == "none", by_schedule, "schedule.warmup_epochs schedule.warmup_updates"),
        (not warm, "without a warm-up", "schedule.warmup_lr schedule.warmup_prefix"),
        # Always, or it makes no difference.
        (name in ("linear", "wsd", "rsqrt", "constant"), by_schedule, "schedule.warmup_prefix"),
        (name in ("step", "constant", "none"), by_schedule, "schedule.min_lr"),
        (name != "step", by_schedule, "schedule.decay_epochs"),
        (name not in ("step", "poly"), by_schedule, "schedule.decay_rate"),
        (
            not parallel.enabled,
            "without parallel.ep above 1 or parallel.fsdp",
            "parallel.dp parallel.materialize parallel.recompute parallel.wire parallel.chunks",
        ),
        (parallel.ep == 1, "with parallel.ep=1", "parallel.ranks_per_node"),
        (alarms.loss_spike is None, "with alarms.loss_spike=null", "alarms.loss_window"),
        (not alarms.stop_not_finite, "with alarms.stop_not_finite=false", "alarms.find_not_finite"),
    ]
