"""The model that a checkpoint of the original is of, read off the shapes of its weights."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from vmoe_torch.checkpoints.convert import Origin, read_converted, read_state
from vmoe_torch.checkpoints.wire import CheckpointError
from vmoe_torch.models.weights import join_members, load_adapted


def open_original(source: str | os.PathLike) -> nn.Module:
    """The model of a checkpoint of the original, with its weights.

    A checkpoint says nothing of its routing: number of selected experts, capacity and order are the defaults of `VMoE`
    (of `VMoEEnsemble` for an ensemble); `set_routing` changes them.

    Args:
        source: a .safetensors file of `convert`, or what the names of the original's files begin with.

    Raises:
        CheckpointError: if a file is damaged or missing, or is a .safetensors file of another program.
        ValueError: if the weights are not those of a model of ours.
    """
    source = os.fspath(source)
    state, origin = read_converted(source) if source.endswith(".safetensors") else read_state(source)
    if origin is None:
        raise CheckpointError(f"{source} must be a file that vmoe convert wrote, got one without its metadata")
    weights = {name: value for name, value in state.items() if not name.startswith("original/")}
    try:
        arguments = model_arguments(join_members(weights), origin)
    except KeyError as error:
        raise ValueError(f"{source} must hold the weights of a V-MoE, missing {error}") from None
    model = timm.create_model("vmoe_s32" if origin.ensemble_size == 1 else "eee_s32_last2_e8", **arguments)
    load_adapted(model, weights, source)
    return model


def is_original(source: str | os.PathLike) -> bool:
    """Whether `open_original` would look into this file."""
    return os.fspath(source).endswith(".safetensors") or Path(f"{os.fspath(source)}.index").is_file()


def model_arguments(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    """The arguments of a `VMoE` or `VMoEEnsemble` with these weights.

    Args:
        state: names as ours, an ensemble's routers joined.
        origin: what the shapes do not say.

    Raises:
        KeyError: if a weight that every model has is missing.
    """
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    routers = {int(name.split(".")[1]): value for name, value in state.items() if name.endswith(".mlp.router.weight")}
    class_token = "cls_token" in state
    arguments = {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1),
        "num_heads": origin.num_heads,
        # A hair more, as timm rounds down what may come out just below.
        "mlp_ratio": math.nextafter(state["blocks.0.mlp.fc1.weight"].shape[-2] / width, math.inf),
        "class_token": class_token,
        "global_pool": "map" if "attn_pool.latent" in state else "token" if class_token else "avg",
        "representation_size": len(state["pre_logits.0.weight"]) if "pre_logits.0.weight" in state else 0,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "moe_layers": tuple(sorted(routers)),
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    if routers:
        arguments["num_experts"] = len(next(iter(routers.values())))
    if "pos_embed" in state:
        arguments["img_size"] = patch * math.isqrt(state["pos_embed"].shape[1] - class_token)
    else:
        # The original stores no positions that it can compute.
        arguments["pos_embed"] = "sincos2d"
    if origin.ensemble_size > 1:
        arguments["ensemble_size"] = origin.ensemble_size
    return arguments
