"""Checks of a layer's settings, and the forms in which they may be given."""

import math
from collections.abc import Sequence
from typing import Any

from vmoe_kernels.common.checks import check_integer, check_number
from vmoe_kernels.experts.activations import check_activation
from vmoe_torch.layers.options import CapacityFactor, GroupSize, MeanSelectedExperts

# Stands for a capacity factor.
DROPLESS = "dropless"
# The least number above 0.
_TINY = math.ulp(0.0)
GROUP_SIZES = {"batch": 0, "image": 1}


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """The value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_capacity_factor(name: str, value: CapacityFactor) -> CapacityFactor:
    """The value, a number above 0 or "dropless"."""
    if isinstance(value, str):
        if value != DROPLESS:
            raise ValueError(f"{name} must be above 0 or {DROPLESS!r}, got {value!r}")
        return value
    return check_number(name, value, "above 0", _TINY)


def refuse_dropless(ranks: int) -> None:
    """Experts that are spread over ranks exchange equal numbers of rows: capacities say how many."""
    raise ValueError(
        f"capacity_factor must be a number with expert parallelism (ep={ranks}), got {DROPLESS!r}: set one, e.g. by "
        "vmoe_torch.set_routing(model, capacity_factor=1.05)"
    )


def group_images(group_size: GroupSize) -> int:
    """Images per group: a positive int, "image" (1) or "batch" (0)."""
    if isinstance(group_size, str):
        one_of("group_size", group_size, tuple(GROUP_SIZES))
        return GROUP_SIZES[group_size]
    return check_integer("group_size", group_size, 1, "'batch', 'image' or at least 1 image")


def check_means(means: MeanSelectedExperts, num_selected_experts: int) -> tuple[float, ...]:
    """`mean_selected_experts` as a tuple, each above 0 and at most K, one if all are equal; none if it is None."""
    if means is None:
        return ()
    name, rule = "mean_selected_experts", f"above 0 and at most num_selected_experts={num_selected_experts}"
    listed = tuple(means) if isinstance(means, Sequence) and not isinstance(means, str) else (means,)
    if not listed:
        raise ValueError(f"{name} must be {rule}, got none")
    below = math.nextafter(num_selected_experts, math.inf)
    found = tuple(check_number(name, mean, rule, _TINY, below) for mean in listed)
    return found if len(set(found)) > 1 else found[:1]


def check_threshold(threshold: float | None) -> float | None:
    """`gate_threshold` in 0..1, or None."""
    rule = "None or in 0..1"
    return None if threshold is None else check_number("gate_threshold", threshold, rule, 0.0, math.nextafter(1.0, 2.0))


def activation_name(act_layer: Any) -> str:
    """The kernels' name of an activation given as a name, a class or a partial of one."""
    name = act_layer
    if not isinstance(name, str):
        name = getattr(act_layer, "func", act_layer).__name__
        if name == "GELU" and getattr(act_layer, "keywords", {}).get("approximate") == "tanh":
            name = "gelu_tanh"
    name = {"gelutanh": "gelu_tanh"}.get(name.lower(), name.lower())
    try:
        check_activation(name)
    except ValueError as error:
        raise ValueError(f"act_layer of the experts: {error}") from None
    return name
