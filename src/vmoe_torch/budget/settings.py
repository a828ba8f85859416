"""What may be set in one MoE layer, and in all of them at once."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import nn

from vmoe_torch.control import capacity_text, moe_layers, routing, set_routing

# Of K.
MEANS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
CAPACITY_FACTORS = (3.0, 2.0, 1.5, 1.05, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


@dataclasses.dataclass(frozen=True)
class LayerSetting:
    """K, the capacity factor in eval mode, and the order of one MoE layer."""

    num_selected_experts: int
    """K, in 1..E."""
    eval_capacity_factor: float | Literal["dropless"]
    """Slots per expert in eval mode, as a multiple of the balanced load; above 0, or "dropless"."""
    batch_priority: bool = True
    """Batch Priority Routing, or position order."""
    mean_selected_experts: float | tuple[float, ...] | None = None
    """Experts per token on average; None is K. A layer that was not trained by threshold needs gate_threshold, too."""
    gate_threshold: float | None = None
    """Gate below which a choice takes no slot; None is none or, with a mean, the one of a training by threshold."""

    @property
    def mean(self) -> str:
        """Experts per token on average, of several means the largest; "-" where it is K."""
        means = self.mean_selected_experts
        return "-" if means is None else f"{max(means) if isinstance(means, Iterable) else means:g}"

    def __str__(self) -> str:
        order = "BPR" if self.batch_priority else "vanilla"
        mean = "" if self.mean_selected_experts is None else f" mean={self.mean}"
        threshold = "" if self.gate_threshold is None else f" threshold={self.gate_threshold:.3g}"
        return f"K={self.num_selected_experts} C={capacity_text(self.eval_capacity_factor)} {order}{mean}{threshold}"


# The setting of each MoE layer, by the names of `vmoe_torch.moe_layers`.
Assignment = dict[str, LayerSetting]


def current_settings(model: nn.Module) -> Assignment:
    """How the MoE layers are set now."""
    return {
        name: LayerSetting(
            layer.num_selected_experts,
            layer.eval_capacity_factor,
            layer.batch_priority,
            layer.mean_selected_experts,
            layer.gate_threshold,
        )
        for name, layer in moe_layers(model).items()
    }


def fitted(model: nn.Module, settings: Mapping[str, LayerSetting]) -> Assignment:
    """The settings with K, and a mean, of no more than a layer's experts, where other layers have as many as that."""
    numbers = {name: layer.num_experts for name, layer in moe_layers(model).items()}
    most, fitting = max(numbers.values(), default=0), {}
    for name, setting in settings.items():
        if numbers[name] < setting.num_selected_experts <= most:
            means = setting.mean_selected_experts
            if isinstance(means, Iterable):
                means = tuple(min(mean, numbers[name]) for mean in means)
            elif means is not None:
                means = min(means, numbers[name])
            setting = dataclasses.replace(setting, num_selected_experts=numbers[name], mean_selected_experts=means)
        fitting[name] = setting
    return fitting


def assign(model: nn.Module, settings: Mapping[str, LayerSetting]) -> None:
    """Sets these layers for good, as `fitted` has it."""
    layers = moe_layers(model)
    for name, setting in fitted(model, settings).items():
        now = layers[name].routing()
        # Of a layer without a mean and a threshold none is taken away.
        wanted = dataclasses.asdict(setting).items()
        changes = {key: value for key, value in wanted if value is not None or now.get(key) is not None}
        set_routing(model, layers=[name], **changes)


@contextmanager
def assigned(model: nn.Module, settings: Mapping[str, LayerSetting]) -> Iterator[nn.Module]:
    """`assign` for the length of a `with` block."""
    with routing(model):
        assign(model, settings)
        yield model


def default_settings(present: Assignment) -> list[LayerSetting]:
    """Every K up to the largest that is set, at every capacity factor up to the largest that is set; all with BPR.

    Of layers that are set to a mean with the thresholds of their training also means in between, at the two largest.
    """
    selected = max(setting.num_selected_experts for setting in present.values())
    set_now = {setting.eval_capacity_factor for setting in present.values()}
    if "dropless" in set_now:
        factors = ["dropless", *CAPACITY_FACTORS]
    else:
        factors = [max(set_now), *(factor for factor in CAPACITY_FACTORS if factor < max(set_now))]
    settings = [LayerSetting(k, factor) for k in range(selected, 0, -1) for factor in factors]
    if all(each.mean_selected_experts is not None and each.gate_threshold is None for each in present.values()):
        means = [selected * share for share in MEANS]
        settings += [LayerSetting(selected, factor, True, mean) for mean in means for factor in factors[:2]]
    return settings
