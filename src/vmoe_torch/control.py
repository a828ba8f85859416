"""Routing control from outside: set or try another capacity, K or priority, and read what the routers did."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from vmoe_torch.layers.calibration import Images, find_thresholds
from vmoe_torch.layers.moe_mlp import MoeMlp
from vmoe_torch.layers.of_model import moe_layers
from vmoe_torch.layers.options import CapacityFactor, MeanSelectedExperts, RoutingOptions
from vmoe_torch.layers.routers.threshold import Threshold


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode for the length of a `with` block; every module gets its own mode back, also after an error."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training


def capacity_text(capacity_factor: CapacityFactor) -> str:
    """As tables and descriptions show it."""
    return capacity_factor if isinstance(capacity_factor, str) else f"{capacity_factor:g}"


def set_routing(
    model: nn.Module,
    *,
    layers: str | Iterable[str] | None = None,
    data: Images | None = None,
    **changes: Unpack[RoutingOptions],
) -> None:
    """Changes the routing of every MoE layer, or of some, for good; what is not given stays.

    What was chosen so goes where the model's weights go: into state dicts, checkpoints and folders for the Hub.

    Args:
        model: any module with MoE layers.
        layers: names of the layers to change, as `moe_layers` has them, or one; None is all.
        data: images to find each layer's gate_threshold on, for one mean_selected_experts: batches (B, C, H, W), alone
            or before labels, or one tensor. The model runs on them; no training is needed.
        **changes: num_selected_experts, K, in 1..E of every layer (a larger mean_selected_experts that is set
            becomes K, too, unless one is given); capacity_factor, a number or "dropless", in training
            and, unless eval_capacity_factor is given too, in eval mode; eval_capacity_factor, in eval mode only (None
            is capacity_factor); batch_priority, Batch Priority Routing or position order; priority, "max" or "sum" of a
            token's gates; group_size, images per group, "batch" or "image"; mean_selected_experts, experts per token
            on average, with data or, for router "threshold", with the thresholds of its training unless gate_threshold
            is given too; gate_threshold, below which choices take no slot.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if the model has no MoE layer, a name or a value is off, or there is no image; then nothing has
            changed.

    Warns:
        UserWarning: if a model in eval mode has no threshold for this mean, and so cuts nothing.
    """
    unknown = changes.keys() - RoutingOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(RoutingOptions.__annotations__)
        raise TypeError(f"routing must be of {known}, got {', '.join(sorted(unknown))}")
    given = dict(changes)
    if "capacity_factor" in given:
        given.setdefault("eval_capacity_factor", None)
    if data is not None:
        mean = given.get("mean_selected_experts")
        if "gate_threshold" in given or mean is None or isinstance(mean, Sequence):
            raise ValueError(
                "data must come with one number as mean_selected_experts, and without gate_threshold, got "
                f"mean_selected_experts={mean}"
            )
        # Until it is found, which needs a mean.
        given["gate_threshold"] = 0.0
    elif "mean_selected_experts" in given:
        # A threshold belongs to the mean that it was found for.
        given.setdefault("gate_threshold", None)
    found = moe_layers(model)
    if not found:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    names = list(found) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"layers must be among {', '.join(found)}, got {', '.join(unknown)}")
    before = [(found[name], found[name].routing_state()) for name in names]
    try:
        for layer, _ in before:
            layer.choose_routing({**_means_up_to(layer, given), **given})
        if data is not None:
            with eval_mode(model):
                thresholds = find_thresholds(model, {name: found[name] for name in names}, data)
            for name, threshold in thresholds.items():
                found[name].choose_routing({"gate_threshold": threshold})
        if "mean_selected_experts" in given:
            _warn_of_no_threshold({name: found[name] for name in names})
    # A user who does not want to wait for the data has nothing changed, either, nor one to whom warnings are errors.
    except BaseException:
        for layer, state in before:
            layer.restore_routing(state)
        raise


def _means_up_to(layer: MoeMlp, given: Mapping[str, Any]) -> dict[str, MeanSelectedExperts]:
    """The means of a layer that are above the K that is given, at that K; none if there is none."""
    most, means = given.get("num_selected_experts"), layer.mean_selected_experts
    if not isinstance(most, Real) or isinstance(most, bool) or means is None:
        return {}
    listed = means if isinstance(means, tuple) else (means,)
    return {} if max(listed) <= most else {"mean_selected_experts": tuple(min(mean, most) for mean in listed)}


def _warn_of_no_threshold(layers: Mapping[str, MoeMlp]) -> None:
    routers = {name: layer.own_router() for name, layer in layers.items() if not layer.training}
    lacking = [name for name, each in routers.items() if isinstance(each, Threshold) and each.lacks_threshold()]
    if lacking:
        mean = routers[lacking[0]].capacity_mean
        warnings.warn(
            f"no training has found a threshold for mean_selected_experts={mean:g} in {', '.join(lacking)}, which "
            "therefore cut nothing: pass data=images to find it",
            stacklevel=3,
        )


@contextmanager
def routing(
    model: nn.Module,
    *,
    layers: str | Iterable[str] | None = None,
    data: Images | None = None,
    **changes: Unpack[RoutingOptions],
) -> Iterator[nn.Module]:
    """`set_routing` for the length of a `with` block; what was set before comes back, also after an error.

    Whatever sets the routing inside the block is undone too, so without changes it guards `set_budget` and the like.

    Args:
        model: as `set_routing`.
        layers: as `set_routing`.
        data: as `set_routing`.
        **changes: as `set_routing`; there may be none.

    Yields:
        The model.

    Raises:
        ValueError: as `set_routing`; then nothing has changed.
    """
    before = [(layer, layer.routing_state()) for layer in moe_layers(model).values()]
    set_routing(model, layers=layers, data=data, **changes)
    try:
        yield model
    finally:
        for layer, state in before:
            layer.restore_routing(state)


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The auxiliary loss of the last forward: each layer's mean over groups, weighted, summed over layers.

    Layers in the "injected" mode have seen to their gradient already and give a detached value, to log. Layers in the
    "manual" mode give a loss to add to the total (training mode only), the sum over all forwards since the last reading
    or the last backward whose outputs are still there: read it after each forward or once after all crops of a step.
    Reading again before the next forward gives the same, and a reading under `torch.no_grad()` takes nothing away from
    the next one. A compiled layer remembers its last forward only: read it after each.

    Args:
        model: any module with MoE layers, after a forward.

    Returns:
        0-dim float32; 0 for a model that has not run or has no MoE layer.
    """
    total = None
    for layer in moe_layers(model).values():
        record = layer.record
        loss = None if torch.compiler.is_compiling() else record.waiting()
        if loss is None:
            loss = record.loss
        if loss is None and record.importance is not None and record.importance.shape[0] > 0:
            loss = layer.own_router().auxiliary_loss(
                record.importance, record.load, record.mean_gates, record.top1_share
            )
        if loss is not None:
            total = loss if total is None else total + loss
    return torch.zeros(()) if total is None else total


def routing_stats(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the routers did in the last forward, per layer and detached; nothing is computed before it is asked for.

    Args:
        model: any module with MoE layers, after a forward.

    Returns:
        {layer name: {
            "load": (E,) share of the kept choices that each expert processed,
            "assigned": (E,) share of all choices that wanted each expert,
            "importance": (E,) share of the summed noise-free gates,
            "dropped": 0-dim share of choices dropped, of those that a threshold lets through where there is one,
            "unprocessed": 0-dim share of tokens whose choices were all dropped,
            "gates": (K,) mean gate of each choice rank,
            "selected": (K + 1,) share of tokens with 0 to K choices above the threshold, where there is one,
        }}; layers that have not run are left out, also those whose last forward was recorded by a tracer. Expert-choice
        and soft layers drop nothing: they have no "dropped", "assigned" and "importance", and a gate for every expert
        or slot. After `torch.vmap`, of all samples.

    Raises:
        ValueError: if the last forward had no values: on the meta device or with fake tensors.
    """
    stats = {}
    for name, layer in moe_layers(model).items():
        record = layer.record
        if record.slots is None or record.slots.numel() == 0:
            continue
        if not record.has_values():
            kind = f"{type(record.slots).__name__} on {record.slots.device}"
            raise ValueError(f"the last forward must have had values to give statistics, got a {kind} in {name}")
        kept = record.slots >= 0
        experts = record.experts
        if experts is None:
            # As many columns for one expert as for any other, in order.
            experts = torch.arange(kept.shape[1], device=kept.device) * layer.num_experts // kept.shape[1]
            experts = experts.expand_as(kept)
        count = torch.zeros(layer.num_experts, device=kept.device)
        load = count.index_add(0, experts.reshape(-1).long(), kept.reshape(-1).float())
        layer_stats = {
            "load": load / load.sum().clamp(min=1.0),
            "unprocessed": 1.0 - kept.any(1).float().mean(),
            "gates": record.gates.float().mean(0),
        }
        if record.experts is not None:
            wanted = torch.ones_like(kept) if record.selected is None else record.selected
            assigned = count.index_add(0, experts.reshape(-1).long(), wanted.reshape(-1).float())
            layer_stats["dropped"] = (wanted.sum() - kept.sum()) / wanted.sum().clamp(min=1)
            layer_stats["assigned"] = assigned / assigned.sum().clamp(min=1.0)
            if record.selected is not None:
                numbers = torch.arange(wanted.shape[1] + 1, device=wanted.device)
                layer_stats["selected"] = (wanted.sum(1, keepdim=True) == numbers).float().mean(0)
        if record.importance is not None:
            importance = record.importance.float().sum(0)
            layer_stats["importance"] = importance / importance.sum()
        stats[name] = layer_stats
    return stats
