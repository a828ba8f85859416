"""Names of the original's parameters to ours, and what loading adapts on the way."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's ViT filter (resampling of patches and positions), which would drop the pre-logits layer."""
    source = state_dict.get("model", state_dict)
    source = source.get("state_dict", source)
    filtered = vit_filter_fn(state_dict, model)
    if isinstance(model.pre_logits, nn.Sequential):
        filtered.update({name: value for name, value in source.items() if name.startswith("pre_logits.")})
    return filtered


def from_original(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Converts the original's parameters to a state dict of `VMoE`.

    Args:
        arrays: parameter path, e.g. "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel" -> array.

    Returns:
        State dict; linear kernels are transposed, query, key and value fused.

    Raises:
        ValueError: if a path is unknown or a part of a fused projection is missing.
    """
    state: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for path, array in arrays.items():
        value = torch.from_numpy(np.array(array))
        name = _rename(path)
        if name is None:
            raise ValueError(f"parameter path must be one of the original's, got {path!r}")
        if "{" in name:
            part = path.split("/")[-2]
            fused.setdefault(name, {})[part] = _projection(value, path)
        elif path.endswith("/out/kernel"):
            state[name] = value.flatten(0, -2).t().contiguous()
        elif path == "embedding/kernel":
            state[name] = value.permute(3, 2, 0, 1).contiguous()
        elif path.endswith("/kernel"):
            state[name] = value.transpose(-1, -2).contiguous()
        else:
            state[name] = value
    for name, parts in fused.items():
        target, _, order = name.partition("{")
        names = order.rstrip("}").split(",")
        missing = [part for part in names if part not in parts]
        if missing:
            raise ValueError(f"{target} must have query, key and value, missing {missing}")
        state[target] = torch.cat([parts[part] for part in names])
    return state


def _projection(value: Tensor, path: str) -> Tensor:
    """(D, heads, head dim) kernel or (heads, head dim) bias -> (D_out, D) or (D_out,)."""
    return value.flatten(1).t() if path.endswith("kernel") else value.flatten()


_LEAF = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_TOP = {
    "cls": "cls_token",
    "Encoder/posembed_input/pos_embedding": "pos_embed",
    "MapHead/probe": "attn_pool.latent",
}
_MODULES = (
    (r"embedding", "patch_embed.proj"),
    (r"Encoder/encoder_norm", "norm"),
    (r"pre_logits", "pre_logits.0"),
    (r"head", "head"),
    (r"Encoder/encoderblock_(\d+)/LayerNorm_0", r"blocks.\1.norm1"),
    (r"Encoder/encoderblock_(\d+)/LayerNorm_1", r"blocks.\1.norm2"),
    (r"Encoder/encoderblock_(\d+)/SelfAttention/out", r"blocks.\1.attn.proj"),
    (r"Encoder/encoderblock_(\d+)/Mlp/Dense_0", r"blocks.\1.mlp.fc1"),
    (r"Encoder/encoderblock_(\d+)/Mlp/Dense_1", r"blocks.\1.mlp.fc2"),
    (r"Encoder/encoderblock_(\d+)/Moe/Mlp/Dense_0", r"blocks.\1.mlp.fc1"),
    (r"Encoder/encoderblock_(\d+)/Moe/Mlp/Dense_1", r"blocks.\1.mlp.fc2"),
    (r"Encoder/encoderblock_(\d+)/Moe/Router/dense", r"blocks.\1.mlp.router"),
    (r"MapHead/MultiHeadDotProductAttention/out", "attn_pool.proj"),
    (r"MapHead/LayerNorm", "attn_pool.norm"),
    (r"MapHead/Mlp/Dense_0", "attn_pool.mlp.fc1"),
    (r"MapHead/Mlp/Dense_1", "attn_pool.mlp.fc2"),
)
# Fused targets carry the order of their parts in braces.
_FUSED = (
    (r"Encoder/encoderblock_(\d+)/SelfAttention/(query|key|value)", r"blocks.\1.attn.qkv.%s{query,key,value}"),
    (r"MapHead/MultiHeadDotProductAttention/query", r"attn_pool.q.%s{query}"),
    (r"MapHead/MultiHeadDotProductAttention/(key|value)", r"attn_pool.kv.%s{key,value}"),
)


def _rename(path: str) -> str | None:
    if path in _TOP:
        return _TOP[path]
    module, _, leaf = path.rpartition("/")
    if leaf not in _LEAF:
        return None
    for pattern, target in _FUSED:
        if re.fullmatch(pattern, module):
            return re.sub(pattern, target % _LEAF[leaf], module)
    for pattern, target in _MODULES:
        if re.fullmatch(pattern, module):
            return re.sub(pattern, target, module) + "." + _LEAF[leaf]
    return None


def load_original_npz(model: nn.Module, path: str, prefix: str = "") -> None:
    """Loads an .npz of the original's parameters, adapting patches, positions, channels and head.

    Args:
        model: a VMoE; nothing in it changes on an error.
        path: the .npz file.
        prefix: what the names of the wanted arrays begin with, e.g. "params/".

    Raises:
        ValueError: if no array has the prefix, a name is unknown, or a shape does not fit.
    """
    with np.load(path) as file:
        arrays = {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}
    if not arrays:
        raise ValueError(f"{path} must hold arrays named {prefix}..., found none")
    state = checkpoint_filter_fn(from_original(arrays), model)
    own = model.state_dict()
    if model.num_classes != state.get("head.weight", own.get("head.weight", torch.empty(0))).shape[0]:
        state = {name: own.get(name, value) if name.startswith("head.") else value for name, value in state.items()}
    wrong = sorted(
        [f"{name} is missing" for name in own.keys() - state.keys()]
        + [f"{name} is not in the model" for name in state.keys() - own.keys()]
        + [
            f"{name} must be {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
    )
    if wrong:
        raise ValueError(f"{path} does not fit the model: " + "; ".join(wrong[:8]))
    model.load_state_dict(state)
