"""Routing settings: what may change in the MoE layers of a trained model."""

import dataclasses
from collections.abc import Iterable
from itertools import product

from vmoe_torch.layers.options import CapacityFactor


@dataclasses.dataclass(frozen=True)
class RoutingSetting:
    """One way to run the MoE layers of a model; None leaves every layer its own value."""

    capacity_factor: CapacityFactor | None = None
    """Slots per expert, as a multiple of the balanced load; above 0, or "dropless"."""
    num_selected_experts: int | None = None
    """K, in 1..E of every layer."""
    batch_priority: bool | None = None
    """Batch Priority Routing, or position order."""
    mean_selected_experts: float | None = None
    """Experts per token on average, above 0 and up to K."""
    gate_threshold: float | None = None
    """Gate below which a choice takes no slot, in 0..1."""

    def changes(self) -> dict:
        """Keyword arguments for `vmoe_torch.routing`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def setting_grid(
    capacity_factors: Iterable[CapacityFactor],
    num_selected_experts: Iterable[int],
    batch_priority: Iterable[bool] = (False, True),
    mean_selected_experts: Iterable[float | None] = (None,),
    gate_thresholds: Iterable[float | None] = (None,),
) -> list[RoutingSetting]:
    """Every combination, the number of experts changing slowest and the threshold fastest."""
    axes = (num_selected_experts, capacity_factors, batch_priority, mean_selected_experts, gate_thresholds)
    return [
        RoutingSetting(capacity, selected, priority, mean, threshold)
        for selected, capacity, priority, mean, threshold in product(*map(tuple, axes))
    ]
