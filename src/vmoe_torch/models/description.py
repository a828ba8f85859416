"""What a model was made with, so that it can be made again: for config.json, state dicts and weight files.

A routing argument (`MoeMlp.routing()` has them) that was chosen after a model was made stands there with its value in
every MoE layer: `{"blocks.1.mlp": 1, "blocks.3.mlp": 2}`. `VMoE` takes such a dict in place of one value.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vmoe_torch.layers.of_model import moe_layers

# Of timm's factories, not of the model.
_FACTORY = ("device", "dtype", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
_FACTORY += ("features_only", "feature_cls", "out_indices", "pruned", "scriptable", "exportable", "no_jit")

# Checked against K and each other.
_OF_K = ("mean_selected_experts", "gate_threshold")


def routing_arguments(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The arguments that give a new model the routing that was chosen for this one; empty if none was."""
    layers = moe_layers(model)
    chosen = {name for layer in layers.values() for name in layer.chosen_routing()}
    now = {name: layer.routing() for name, layer in layers.items()}
    names = dict.fromkeys(name for routing in now.values() for name in routing if name in chosen)
    return {name: {layer: now[layer][name] for layer in layers} for name in names}


def by_layer(moe: Mapping[str, Any], blocks: Iterable[int]) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Arguments that every MoE layer can be made with, and those of `choose_per_layer` that each gets afterwards.

    Args:
        moe: arguments of `VMoE`, each one value or one for each layer.
        blocks: numbers of the blocks with a MoE layer.
    """
    per_layer = {name: value for name, value in moe.items() if isinstance(value, Mapping)}
    experts = per_layer.pop("num_experts", None)
    # Until then any of the values.
    first = {name: next(iter(values.values()), None) for name, values in per_layer.items()}
    if experts is not None:
        first["num_experts"] = experts_by_block(experts, blocks)
        # Any layer may have one.
        first |= {"num_selected_experts": 1} if "num_selected_experts" in per_layer else {}
    apart = [per_layer[name] for name in ("num_selected_experts", *_OF_K) if name in per_layer]
    if apart:
        # Only those of one layer must agree.
        alike = [name for name in _OF_K if name not in per_layer and moe[name] is not None]
        per_layer |= {name: dict.fromkeys(apart[0], moe[name]) for name in alike}
        first |= dict.fromkeys(_OF_K)
    return {**moe, **first}, per_layer


def as_it_is(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the routing that was chosen for a model, and the slots that it has."""
    found = {**arguments, **routing_arguments(model)}
    slots = {layer.own_router().slots_per_expert for layer in moe_layers(model).values()} - {None}
    if slots:
        # Left to the capacity factor, it would be another number for other images.
        found["slots_per_expert"] = slots.pop()
        found.pop("capacity_factor", None)
    return found


def choose_per_layer(model: nn.Module, arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets the routing of every MoE layer as `routing_arguments` describes it.

    Raises:
        ValueError: if an argument does not name exactly the MoE layers, or a value is off.
    """
    layers = moe_layers(model)
    for name, values in arguments.items():
        if values.keys() != layers.keys():
            raise ValueError(
                f"{name} must be one value, or have one for each of {', '.join(layers) or 'no MoE layers'}, "
                f"got {', '.join(map(str, values)) or 'none'}"
            )
    for layer_name, layer in layers.items():
        layer.choose_routing({name: values[layer_name] for name, values in arguments.items()})


def constructor_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of a timm factory makes the model: for timm, too, rates of dropout are a training's."""
    return {name: value for name, value in kwargs.items() if name not in _FACTORY and not name.endswith("drop_rate")}


def experts_by_block(numbers: Mapping[str, int], blocks: Iterable[int]) -> dict[int, int]:
    """Numbers of experts by the blocks' numbers, of those by the layers' names.

    Raises:
        ValueError: if they do not name exactly the MoE layers.
    """
    names = {f"blocks.{block}.mlp": block for block in blocks}
    if numbers.keys() != names.keys():
        raise ValueError(
            f"num_experts must be one value, or have one for each of {', '.join(names) or 'no MoE layers'}, "
            f"got {', '.join(map(str, numbers)) or 'none'}"
        )
    return {names[name]: value for name, value in numbers.items()}


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of `timm.create_model` that make this model again, with the classes, images and routing of now.

    Args:
        model: made by `timm.create_model`, a `VMoE`.
    """
    now = {"num_classes": model.num_classes, "in_chans": model.patch_embed.proj.in_channels}
    now["global_pool"] = model.global_pool
    if model.patch_embed.img_size is not None:
        now["img_size"] = tuple(model.patch_embed.img_size)
    if hasattr(model, "num_frames"):
        now["num_frames"] = model.num_frames
    return as_it_is(model, {**model.made_with, **now})


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Plain values that make the model again, and what its weights' shapes do not say.

    Returns:
        {"architecture": name of a timm model, "model_args": for `timm.create_model`, "grid": [rows, columns] of
        patches, "num_heads": of attention}; None for a model that was not made by timm, or with arguments that are not
        plain values.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or model.made_with is None:
        return None
    found = {"architecture": cfg["architecture"], "model_args": model_arguments(model)}
    found |= {"grid": model.patch_embed.grid_size, "num_heads": model.blocks[0].attn.num_heads}
    try:
        # Tuples become lists, and nothing but plain values is left.
        return json.loads(json.dumps(found))
    except (TypeError, ValueError):
        return None
