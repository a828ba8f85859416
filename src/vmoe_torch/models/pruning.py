"""Pruning after training: the experts that a model needs least are dropped, and their rows of the router with them.

By how far the router's row of an expert moved in fine-tuning (arXiv 2405.16646, which showed it on V-MoE), or by how
many choices the expert processed on some images.

Dims: D width, E experts before, F experts kept, K choices of a token, S tokens of a group, C slots.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe_kernels.common.checks import check_flag, check_integer
from vmoe_torch.layers import ExpertChoice, ExpertLinear, MoeMlp, TopExperts
from vmoe_torch.layers.int8_experts import refuse_int8
from vmoe_torch.layers.of_model import moe_layers
from vmoe_torch.layers.options import MoeOptions
from vmoe_torch.layers.routers.base import Router
from vmoe_torch.layers.settings import DROPLESS, one_of
from vmoe_torch.layers.sizes import ExpertSizes
from vmoe_torch.layers.usage import ExpertUsage
from vmoe_torch.models.ensemble import EnsembleMoeMlp
from vmoe_torch.models.vmoe import VMoE
from vmoe_torch.weights.sources import read_weights

Keep = int | float | Sequence[int]
Criterion = Literal["movement", "norm"]
# Whose layers can lose experts: what another kind keeps for each expert is not known here.
ROUTERS = (TopExperts, ExpertChoice)
# What says nothing of a dense model.
_MOE = get_type_hints(MoeOptions)
_PARAMETERS = {"router.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
# Tokens of a group up to which the capacity is held as it was.
_GROUP = 1 << 13
# Floats on either side that are tried for it.
_NEIGHBOURS = 4


@torch.no_grad()
def prune_experts(
    model: nn.Module,
    keep: Keep | Mapping[str, Keep],
    *,
    before: nn.Module | Mapping[str, Tensor] | str | os.PathLike | None = None,
    usage: Mapping[str, ExpertUsage | Tensor] | None = None,
    criterion: Criterion = "movement",
    keep_capacity: bool = True,
) -> nn.Module:
    """A copy of a model without the experts that it needs least; see `kept_experts` for which stay.

    The kept experts and their rows of the router are what they were, in the same order. K becomes the number of experts
    where fewer are left. The softmax runs over fewer experts, so a token's gates grow by 1 / (1 - p), with p the sum
    of its gates of the dropped ones. So nothing changes where dropped experts have a gate of 0 in float32 for every
    token (a logit some 104 below the largest): bit for bit, but for the order in which the router's own sums are taken.
    With `renormalize_gates` it is enough that no token has a dropped expert among its K choices.

    Args:
        model: any with MoE layers of the routers "top_experts" and "expert_choice"; not changed.
        keep: as in `kept_experts`.
        before: as in `kept_experts`.
        usage: as in `kept_experts`.
        criterion: as in `kept_experts`.
        keep_capacity: whether an expert keeps its C slots, so that the layer's FLOPs fall with its experts and no token
            is dropped that was not; the capacity factors, which stand for C relative to a balanced load, change to
            what gives it (by the rounding of floats, C may be one more or less in groups of single sizes). Otherwise
            they stay, and C grows as the number of experts falls.

    Returns:
        The copy, in the same mode; a `VMoE` that timm made knows its number of experts, per layer where they differ, so
        that state dicts, checkpoints and `save_for_hf` say it and `timm.create_model` makes it again. An optimiser's
        state does not fit it.

    Raises:
        ValueError: if an argument is off, or a layer is of a kind whose experts cannot be dropped.
    """
    keep_capacity = check_flag("keep_capacity", keep_capacity)
    kept = kept_experts(model, keep, before=before, usage=usage, criterion=criterion)
    model = copy.deepcopy(model)
    for name, layer in moe_layers(model).items():
        if len(kept[name]) < layer.num_experts:
            _drop(layer, kept[name], keep_capacity)
    remember_arguments(model)
    return model


@torch.no_grad()
def kept_experts(
    model: nn.Module,
    keep: Keep | Mapping[str, Keep],
    *,
    before: nn.Module | Mapping[str, Tensor] | str | os.PathLike | None = None,
    usage: Mapping[str, ExpertUsage | Tensor] | None = None,
    criterion: Criterion = "movement",
) -> dict[str, tuple[int, ...]]:
    """The experts that `prune_experts` keeps of each MoE layer, which it takes as `keep` too: for a moving average of
    the same model, say.

    Args:
        model: as in `prune_experts`.
        keep: how many experts of every layer stay, a share of them above 0 and up to 1.0 (a float; rounded up), or
            their numbers (a list or tuple); or a dict of such by the layers' names, where a layer without one keeps
            all.
        before: the weights before fine-tuning: a model, a state dict, or what `read_weights` reads. Of these the
            routers count, which must have as many experts as the model's.
        usage: choices that each expert processed, by layer: of `vmoe_torch.evaluate.expert_usage`, or (E,) numbers.
            Only one of before and usage, and one where `keep` does not number all experts.
        criterion: for `before`, how far the router's row of an expert moved, |w - w0| ("movement"), or how much longer
            it has become, |w| - |w0| ("norm"), which the paper's own code ranks by. The highest stay; of equal ones
            the first.

    Returns:
        {layer name: numbers of the kept experts, ascending}.

    Raises:
        ValueError: if an argument is off, or a layer is of a kind whose experts cannot be dropped.
    """
    wanted = wanted_experts(model, keep)
    one_of("criterion", criterion, get_args(Criterion))
    if before is not None and usage is not None:
        raise ValueError("before and usage must not both be given: experts are ranked by one of them")
    source = None if before is None else _state(before)
    kept = {}
    for name, layer in moe_layers(model).items():
        total, chosen = layer.num_experts, wanted[name]
        if isinstance(chosen, int) and chosen == total:
            chosen = tuple(range(total))
        elif isinstance(chosen, int):
            if source is None and usage is None:
                raise ValueError(f"before or usage must be given to choose {chosen} of {total} experts in {name}")
            ranks = counts_of(name, layer, usage) if source is None else _moved(name, layer, source, criterion)
            order = ranks.sort(descending=True, stable=True).indices
            chosen = tuple(sorted(order[:chosen].tolist()))
        kept[name] = chosen
    return kept


def wanted_experts(model: nn.Module, keep: Keep | Mapping[str, Keep]) -> dict[str, int | tuple[int, ...]]:
    """How many experts of every layer `keep` asks for, or which: what is asked before experts are ranked.

    Raises:
        ValueError: as `kept_experts`, for a model or a `keep`.
    """
    layers = layers_of(model)
    for name, layer in layers.items():
        check_experts(name, layer, ROUTERS)
    wanted = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(layers, keep)
    if unknown := sorted(map(str, wanted.keys() - layers.keys())):
        raise ValueError(f"keep must name layers among {', '.join(layers)}, got {', '.join(unknown)}")
    totals = {name: layer.num_experts for name, layer in layers.items()}
    return {name: _numbered(name, wanted.get(name, total), total) for name, total in totals.items()}


def new_arguments(model: nn.Module, made: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `timm.create_model` for a model that has lost experts, some or all of them.

    Args:
        model: as it is now.
        made: the arguments that it was made with.
    """
    layers = moe_layers(model)
    if not layers:
        return {name: value for name, value in made.items() if name not in _MOE} | {"moe_layers": []}
    new = dict(made)
    changed = ["num_experts", "num_selected_experts"]
    changed += ["mean_selected_experts"] if made.get("mean_selected_experts") is not None else []
    for name in changed:
        numbers = {layer_name: getattr(layer, name) for layer_name, layer in layers.items()}
        new[name] = numbers if len(set(numbers.values())) > 1 else next(iter(numbers.values()))
    if made.get("expert_hidden") is not None:
        # Only experts of one width can be dropped.
        new["expert_hidden"] = next(iter(layers.values())).expert_hidden[0]
    return new


def remember_arguments(model: nn.Module) -> None:
    """Notes in every `VMoE` that timm made which arguments would make what it has become."""
    for part in model.modules():
        if isinstance(part, VMoE) and part.made_with is not None:
            part.made_with = new_arguments(part, part.made_with)
            # timm's own record, since 1.0.31.
            part._model_args = new_arguments(part, getattr(part, "_model_args", {}))


def layers_of(model: nn.Module) -> dict[str, MoeMlp]:
    """The MoE layers of a model by name.

    Raises:
        ValueError: if there is none, or they are an ensemble's.
    """
    refuse_ensembles(model)
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    return layers


def check_experts(name: str, layer: MoeMlp, routers: tuple[type, ...] | None = None) -> None:
    """Raises ValueError if a layer has something that is not known here, or not all of its experts.

    Args:
        name: of the layer.
        layer: to check.
        routers: the kinds that it may have; None is any.
    """
    refuse_int8(layer, f"to be dropped or averaged in {name}")
    if routers is not None and type(layer.router) not in routers:
        raise ValueError(
            f"router must be 'top_experts' or 'expert_choice' for experts to be dropped, got {layer.router_type!r} "
            f"({type(layer.router).__name__}) in {name}"
        )
    held = {key for key, _ in layer.named_parameters()} | {key for key, _ in layer.named_buffers()}
    if routers is None:
        held = {key for key in held if not key.startswith("router.")}
    others = sorted(key for key in held - _PARAMETERS if not key.startswith("shared_expert."))
    if others or type(layer.fc1) is not ExpertLinear or type(layer.fc2) is not ExpertLinear:
        got = ", ".join(others) or f"{type(layer.fc1).__name__} and {type(layer.fc2).__name__}"
        raise ValueError(f"experts must be of one size, in the layers fc1 and fc2 alone, got {got} in {name}")
    if layer.exchange is not None or any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        raise ValueError(f"all experts must be on this device, got {name} spread over ranks: do it before parallelize")
    if any(not parameter.is_floating_point() for parameter in layer.parameters()):
        raise ValueError(f"experts must be of floating point, got quantised ones in {name}")


def refuse_ensembles(model: nn.Module) -> None:
    """Raises ValueError for an ensemble, whose members share out the experts of a layer."""
    for name, module in model.named_modules():
        if isinstance(module, EnsembleMoeMlp):
            raise ValueError(f"model must not be an ensemble, whose members share out their experts, got one in {name}")


def _numbered(name: str, keep: Any, total: int) -> int | tuple[int, ...]:
    """How many experts, or which."""
    if isinstance(keep, str | bool):
        raise ValueError(f"keep must be a number, a share or numbers of experts, got {keep!r} for {name}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a share above 0 and up to 1.0, got {keep} for {name}")
        # What is not a whole number but for rounding goes up.
        return math.ceil(round(keep * total, 9))
    if not isinstance(keep, Iterable):
        return check_integer("keep", keep, 1, f"in 1..{total} in {name}", total)
    rule = f"numbers of experts in 0..{total - 1} in {name}"
    chosen = [check_integer("keep", each, 0, rule, total - 1) for each in keep]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"keep must number at least one expert, and each once, got {chosen} for {name}")
    return tuple(sorted(chosen))


def _state(before: nn.Module | Mapping[str, Tensor] | str | os.PathLike) -> Mapping[str, Tensor]:
    if isinstance(before, nn.Module):
        return before.state_dict()
    return before if isinstance(before, Mapping) else read_weights(before).state


def _moved(name: str, layer: MoeMlp, source: Mapping[str, Tensor], criterion: str) -> Tensor:
    """(E,): how far, or how much longer."""
    now, then = layer.router.weight.detach().cpu().double(), source.get(f"{name}.router.weight")
    if then is None or then.shape != now.shape:
        got = "none" if then is None else tuple(then.shape)
        raise ValueError(f"before must have a router {tuple(now.shape)} for {name}, got {got}")
    then = then.detach().cpu().double()
    ranks = (now - then).norm(dim=1) if criterion == "movement" else now.norm(dim=1) - then.norm(dim=1)
    if not ranks.isfinite().all():
        raise ValueError(f"routers must be finite to be compared, got NaN or infinity in {name}")
    return ranks


def counts_of(name: str, layer: MoeMlp, usage: Mapping[str, ExpertUsage | Tensor]) -> Tensor:
    """(E,) float64: choices of each expert, checked.

    Raises:
        ValueError: if the layer has none, or they are not E finite numbers of at least 0.
    """
    if name not in usage:
        raise ValueError(f"usage must have every layer that it is needed for, got none for {name}")
    found = usage[name]
    counts = torch.as_tensor(found.choices if isinstance(found, ExpertUsage) else found).cpu().double()
    if counts.shape != (layer.num_experts,) or not (counts.isfinite() & (counts >= 0)).all():
        raise ValueError(f"usage must be {layer.num_experts} finite numbers of at least 0 for {name}, got {found}")
    return counts


def _drop(layer: MoeMlp, kept: tuple[int, ...], keep_capacity: bool) -> None:
    router, total = layer.router, layer.num_experts
    index = torch.tensor(kept, device=router.weight.device)
    for module in (router, layer.fc1, layer.fc2):
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter[index], requires_grad=parameter.requires_grad))
    layer.num_experts = router.num_experts = len(kept)
    layer.sizes = router.sizes = ExpertSizes([layer.expert_hidden[expert] for expert in kept])
    layer.expert_hidden = layer.sizes.hidden
    changes, ways = _fewer_choices(router, len(kept))
    if keep_capacity:
        for key in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(router, key)
            if factor != DROPLESS:
                changes[key] = _same_capacity(factor, (total, len(kept)), ways, router.capacity_rounding)
    layer.choose_routing(changes)


def _fewer_choices(router: Router, left: int) -> tuple[dict[str, Any], tuple[float, float]]:
    """What has to change for a token to have no more choices than experts; and by how many C is counted, before, after.

    Expert choice has as many choices as experts, and C does not count them.
    """
    if not isinstance(router, TopExperts):
        return {}, (1, 1)
    changes: dict[str, Any] = {}
    if router.num_selected_experts > left:
        changes["num_selected_experts"] = left
    means = router.means()
    if max(means, default=0) > left:
        changes["mean_selected_experts"] = tuple(min(mean, left) for mean in means)
    counted = router.capacity_mean or router.num_selected_experts
    return changes, (counted, min(counted, left))


def _same_capacity(factor: float, experts: tuple[int, int], choices: tuple[float, float], rounding: str) -> float:
    """The factor that gives as many slots with fewer experts, in groups of as many sizes as floats allow."""
    tokens = np.arange(1, _GROUP + 1, dtype=np.float64)
    whole: Callable = np.ceil if rounding == "ceil" else np.rint
    wanted = whole(tokens * choices[0] * factor / experts[0])
    near = factor * experts[1] / experts[0] * choices[0] / choices[1]
    tried = [near]
    for _ in range(_NEIGHBOURS):
        tried = [math.nextafter(tried[0], 0.0), *tried, math.nextafter(tried[-1], math.inf)]
    tried.sort(key=lambda each: abs(each - near))
    return min(tried, key=lambda each: np.count_nonzero(whole(tokens * choices[1] * each / experts[1]) != wanted))
