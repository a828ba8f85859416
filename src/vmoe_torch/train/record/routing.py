"""What the routers did at a log point: one sample per MoE layer, as numbers on the host."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vmoe_torch.control import moe_layers, routing_stats


@dataclass(frozen=True)
class LayerSample:
    """The last forward of a MoE layer in this process."""

    load: list[float]
    """(E,) share of the kept choices that each expert processed."""
    assigned: list[float] | None
    """(E,) share of all choices that wanted each expert; None where experts choose."""
    importance_cv: float | None
    """Coefficient of variation of the experts' summed gates, whose square the importance loss is; None where experts
    choose."""
    dropped: float | None
    """Share of choices dropped; None where experts choose."""
    num_selected: int
    """K, choices per token."""

    @property
    def max_load(self) -> float:
        """The busiest expert's load over an even one."""
        return max(self.load) * len(self.load)


def sample_routing(model: nn.Module) -> dict[str, LayerSample]:
    """Samples by layer name; waits for the device once."""
    stats = routing_stats(model)
    names = ("load", "assigned", "importance", "dropped")
    parts = [layer[name].float().reshape(-1) for layer in stats.values() for name in names if name in layer]
    numbers = iter(torch.cat(parts).tolist() if parts else [])
    samples = {}
    for layer_name, layer in stats.items():
        values = {
            name: [next(numbers) for _ in range(layer[name].numel())] if name in layer else None for name in names
        }
        importance, dropped = values["importance"], values["dropped"]
        samples[layer_name] = LayerSample(
            values["load"],
            values["assigned"],
            None if importance is None else _variation(importance),
            None if dropped is None else dropped[0],
            layer["gates"].numel(),
        )
    return samples


def _variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean


def routing_columns(model: nn.Module) -> tuple[str, ...]:
    """Columns of routing.csv: as many loads as the largest layer has experts."""
    most = max((layer.num_experts for layer in moe_layers(model).values()), default=0)
    loads = [f"load_{expert}" for expert in range(most)]
    return ("update", "layer", "dropped", "importance_cv", "max_load", *loads)


def routing_row(update: int, name: str, layer: LayerSample) -> dict[str, Any]:
    """A row of routing.csv."""
    loads = {f"load_{expert}": load for expert, load in enumerate(layer.load)}
    return {
        "update": update,
        "layer": name,
        "dropped": layer.dropped,
        "importance_cv": layer.importance_cv,
        "max_load": layer.max_load,
        **loads,
    }


def routing_scalars(samples: dict[str, LayerSample]) -> dict[str, float]:
    """The same for TensorBoard, by tag."""
    scalars = {}
    for name, layer in samples.items():
        shown = {"dropped": layer.dropped, "importance_cv": layer.importance_cv, "max_load": layer.max_load}
        scalars |= {f"routing/{name}/{what}": value for what, value in shown.items() if value is not None}
        scalars |= {f"load/{name}/expert_{expert}": load for expert, load in enumerate(layer.load)}
    return scalars
