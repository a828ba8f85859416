"""The original's parameters as ours and back.

| original | ours | change |
| --- | --- | --- |
| embedding/kernel (P, P, 3, D), bias | patch_embed.proj: weight (D, 3, P, P) | permuted |
| cls | cls_token | |
| Encoder/posembed_input/pos_embedding (1, L, D) | pos_embed | class token first |
| Encoder/encoderblock_i/LayerNorm_0, LayerNorm_1: scale, bias | blocks.i.norm1, norm2: weight, bias | |
| .../SelfAttention/query, key, value: kernel (D, heads, D / heads), bias | blocks.i.attn.qkv: weight (3D, D) | joined |
| query_ln, key_ln beside query and key: scale (D / heads) | q_norm, k_norm: weight, and a bias of 0 | |
| .../SelfAttention/out: kernel (heads, D / heads, D), bias | blocks.i.attn.proj: weight (D, D) | transposed |
| .../Mlp/Dense_0, Dense_1: kernel (in, out), bias | blocks.i.mlp.fc1, fc2: weight (out, in) | transposed |
| .../Moe/Mlp/Dense_0, Dense_1: kernel (E, in, out), bias | blocks.i.mlp.fc1, fc2: weight (E, out, in) | transposed |
| .../Moe/Router/dense/kernel (D, E) | blocks.i.mlp.router.weight (E, D) | transposed |
| the same of an ensemble of M, (D, M, E / M) | blocks.i.mlp.members.m.router.weight (E / M, D) | experts as well |
| Encoder/encoder_norm: scale, bias | norm: weight, bias | |
| pre_logits: kernel, bias | pre_logits.0: weight, bias | transposed |
| MapHead/probe, MultiHeadDotProductAttention, LayerNorm, Mlp | attn_pool.latent, q, kv, proj, norm, mlp | as above |
| head: kernel, bias | head: weight, bias | transposed |

Biases keep their name and are joined where kernels are. The plain ViT's names (Transformer/encoderblock_i/MlpBlock_n,
MultiHeadDotProductAttention_n) are read as well.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_LEAF = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_TOP = {
    "cls": "cls_token",
    "Encoder/posembed_input/pos_embedding": "pos_embed",
    "MapHead/probe": "attn_pool.latent",
}
# {} stands for a block's number.
_MODULES = {
    "embedding": "patch_embed.proj",
    "Encoder/encoder_norm": "norm",
    "pre_logits": "pre_logits.0",
    "head": "head",
    "Encoder/encoderblock_{}/LayerNorm_0": "blocks.{}.norm1",
    "Encoder/encoderblock_{}/LayerNorm_1": "blocks.{}.norm2",
    "Encoder/encoderblock_{}/SelfAttention/query_ln": "blocks.{}.attn.q_norm",
    "Encoder/encoderblock_{}/SelfAttention/key_ln": "blocks.{}.attn.k_norm",
    "Encoder/encoderblock_{}/SelfAttention/out": "blocks.{}.attn.proj",
    "Encoder/encoderblock_{}/Mlp/Dense_0": "blocks.{}.mlp.fc1",
    "Encoder/encoderblock_{}/Mlp/Dense_1": "blocks.{}.mlp.fc2",
    "Encoder/encoderblock_{}/Moe/Mlp/Dense_0": "blocks.{}.mlp.fc1",
    "Encoder/encoderblock_{}/Moe/Mlp/Dense_1": "blocks.{}.mlp.fc2",
    "Encoder/encoderblock_{}/Moe/Router/dense": "blocks.{}.mlp.router",
    "MapHead/MultiHeadDotProductAttention/query_ln": "attn_pool.q_norm",
    "MapHead/MultiHeadDotProductAttention/key_ln": "attn_pool.k_norm",
    "MapHead/MultiHeadDotProductAttention/out": "attn_pool.proj",
    "MapHead/LayerNorm": "attn_pool.norm",
    "MapHead/Mlp/Dense_0": "attn_pool.mlp.fc1",
    "MapHead/Mlp/Dense_1": "attn_pool.mlp.fc2",
}
# Ours -> the original's modules whose parameters are joined in it, in order.
_JOINED = {
    "blocks.{}.attn.qkv": tuple(
        f"Encoder/encoderblock_{{}}/SelfAttention/{part}" for part in ("query", "key", "value")
    ),
    "attn_pool.q": ("MapHead/MultiHeadDotProductAttention/query",),
    "attn_pool.kv": tuple(f"MapHead/MultiHeadDotProductAttention/{part}" for part in ("key", "value")),
}
_PARTS = {path: (name, order) for name, paths in _JOINED.items() for order, path in enumerate(paths)}
# Norms of queries and keys have no bias in the original; timm's have one, which stays 0.
_SCALES = ("query_ln", "key_ln")
_NORMS = ("LayerNorm_0", "LayerNorm_1", "LayerNorm", "encoder_norm", *_SCALES)
_NUMBER = re.compile(r"(?<=encoderblock_)\d+(?=/)|(?<=^blocks\.)\d+(?=\.)")
# The plain ViT's names, whose numbers depend on the version that wrote them.
_PLAIN = (
    (r"^Transformer/", "Encoder/"),
    (r"/MultiHeadDotProductAttention_\d+/", "/SelfAttention/"),
    (r"/MlpBlock_\d+/", "/Mlp/"),
    (r"/LayerNorm_2/", "/LayerNorm_1/"),
)


def _pattern(name: str) -> tuple[str, str]:
    """The name with {} for the block's number, and the number or ""."""
    found = _NUMBER.search(name)
    return (name, "") if found is None else (name[: found.start()] + "{}" + name[found.end() :], found.group())


def from_original(arrays: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
    """Converts the original's parameters to a state dict of `VMoE`.

    Args:
        arrays: parameter path, e.g. "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel" -> array.

    Returns:
        State dict, by the table above; an ensemble's routers are (E, D) still, see `split_members`.

    Raises:
        ValueError: if a path is unknown, twice there, or a part of a joined projection is missing.
    """
    state: dict[str, Tensor] = {}
    joined: dict[str, dict[int, Tensor]] = {}
    for path, array in arrays.items():
        value = array if isinstance(array, Tensor) else _tensor(array)
        if not value.is_floating_point():
            raise ValueError(f"parameter {path!r} must be of floating point, got {value.dtype}")
        plain = path
        if path.startswith("Transformer/"):
            for old, new in _PLAIN:
                plain = re.sub(old, new, plain)
        name, order, value = _to_ours(plain, value, path)
        if name in state or (name in joined and order in joined[name]):
            raise ValueError(f"parameter paths must be unique, got {path!r} for {name} again")
        if order is None:
            state[name] = value
            if plain.rpartition("/")[0].endswith(_SCALES):
                state[f"{name.removesuffix('weight')}bias"] = torch.zeros_like(value)
        else:
            joined.setdefault(name, {})[order] = value
    for name, parts in joined.items():
        module, _, _leaf = name.rpartition(".")
        paths = _JOINED[_pattern(name)[0].rpartition(".")[0]]
        missing = [path.rpartition("/")[2] for order, path in enumerate(paths) if order not in parts]
        if missing:
            raise ValueError(f"{module} must have query, key and value, missing {missing}")
        ordered = [parts[order] for order in range(len(paths))]
        if len({part.shape[1:] for part in ordered}) > 1:
            shapes = [tuple(part.shape) for part in ordered]
            raise ValueError(f"query, key and value of {module} must be of one width, got {shapes} of {_leaf}")
        state[name] = torch.cat(ordered)
    return state


def _tensor(array: np.ndarray) -> Tensor:
    array = np.array(array)
    # Numpy, which has no bfloat16, writes it as two bytes of no type.
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"parameters must be of floating point, got {array.dtype}")
    return torch.from_numpy(array)


def _dims(module: str, leaf: str) -> tuple[int, ...]:
    """Numbers of dims that a parameter of the original may have."""
    if module.endswith("Router/dense"):
        return (2, 3)
    if module == "embedding" and leaf == "kernel":
        return (4,)
    # One more for the heads or the experts.
    more = module in _PARTS or "/Moe/Mlp/" in module or (module.endswith("/out") and leaf == "kernel")
    return ((2 if leaf == "kernel" else 1) + more,)


def _to_ours(path: str, value: Tensor, given: str) -> tuple[str, int | None, Tensor]:
    """Our name, the order in a joined parameter or None, and the value in our layout."""
    if path in _TOP:
        if value.dim() != 3:
            raise ValueError(f"parameter {given!r} must have 3 dims, got {tuple(value.shape)}")
        return _TOP[path], None, value
    pattern, number = _pattern(path)
    module, _, leaf = pattern.rpartition("/")
    last = module.rpartition("/")[2]
    known = (module in _PARTS or module in _MODULES) and leaf in _LEAF and (leaf != "bias" or last not in _SCALES)
    if not known or (leaf == "scale") != (leaf != "bias" and last in _NORMS):
        raise ValueError(f"parameter path must be one of the original's, got {given!r}")
    dims = _dims(module, leaf)
    if value.dim() not in dims:
        raise ValueError(f"parameter {given!r} must have {' or '.join(map(str, dims))} dims, got {tuple(value.shape)}")
    if module in _PARTS:
        name, order = _PARTS[module]
        value = value.flatten(1).t() if leaf == "kernel" else value.flatten()
        return f"{name.format(number)}.{_LEAF[leaf]}", order, value
    name = f"{_MODULES[module].format(number)}.{_LEAF[leaf]}"
    if leaf != "kernel":
        return name, None, value
    if module == "embedding":
        return name, None, value.permute(3, 2, 0, 1).contiguous()
    if module.endswith("/out"):
        value = value.flatten(0, -2)
    elif module.endswith("Router/dense"):
        value = value.flatten(1)
    return name, None, value.transpose(-1, -2).contiguous()


def to_original(state: Mapping[str, Tensor], num_heads: int, ensemble_size: int = 1) -> dict[str, Tensor]:
    """Converts a state dict of `VMoE` to the original's parameters; the inverse of `from_original`, bit for bit.

    Args:
        state: as `from_original` gives it, or of an ensemble.
        num_heads: attention heads of every block, and of the pooling.
        ensemble_size: M of an ensemble, whose routers become (D, M, E / M).

    Returns:
        Parameter path -> tensor.

    Raises:
        ValueError: if the original has no such parameter.
    """
    ours = {name: path for path, name in _MODULES.items()}
    top = {name: path for path, name in _TOP.items()}
    arrays = {}
    state = join_members(state)
    for name, value in state.items():
        if name in top:
            arrays[top[name]] = value
            continue
        pattern, number = _pattern(name)
        module, _, leaf = pattern.rpartition(".")
        if module in _JOINED and leaf in ("weight", "bias"):
            paths = _JOINED[module]
            for path, part in zip(paths, value.chunk(len(paths))):
                if leaf == "weight":
                    part = part.t().reshape(part.shape[1], num_heads, -1)
                else:
                    part = part.reshape(num_heads, -1)
                arrays[f"{path.format(number)}/{'kernel' if leaf == 'weight' else 'bias'}"] = part
            continue
        if module not in ours or leaf not in ("weight", "bias"):
            raise ValueError(f"the original must have a parameter for every one of ours, it has none for {name!r}")
        path = ours[module].format(number)
        if module.endswith((".fc1", ".fc2")) and number:
            path = path.replace("/Moe/Mlp/", "/Mlp/")
            if f"blocks.{number}.mlp.router.weight" in state:
                path = path.replace("/Mlp/", "/Moe/Mlp/")
        if leaf == "bias" and path.endswith(_SCALES):
            if value.any():
                raise ValueError(f"{name} must be 0, as the original's norms of queries and keys have no bias")
        elif leaf == "bias":
            arrays[f"{path}/bias"] = value
        elif path.rpartition("/")[2] in _NORMS:
            arrays[f"{path}/scale"] = value
        elif module == "patch_embed.proj":
            if value.dim() != 4:
                shape = tuple(value.shape)
                raise ValueError(f"{name} must be (D, C, P, P), as the original has no video models, got {shape}")
            arrays[f"{path}/kernel"] = value.permute(2, 3, 1, 0)
        else:
            value = value.transpose(-1, -2)
            if path.endswith("/out"):
                value = value.reshape(num_heads, -1, value.shape[-1])
            elif module.endswith(".router") and ensemble_size > 1:
                value = value.reshape(value.shape[0], ensemble_size, -1)
            arrays[f"{path}/kernel"] = value
    return arrays


def split_members(state: Mapping[str, Tensor], ensemble_size: int) -> dict[str, Tensor]:
    """Gives every member of an ensemble its share of the experts: blocks.i.mlp.* to blocks.i.mlp.members.m.*.

    Each has the shared expert whole, as a copy. Thresholds are left out: they are of gates over all experts.
    """
    routed = {
        name.removesuffix("router.weight") for name in state if re.fullmatch(r"blocks\.\d+\.mlp\.router\.weight", name)
    }
    result = {}
    for name, value in state.items():
        base = re.match(r"(blocks\.\d+\.mlp\.)", name)
        if base is None or base.group() not in routed:
            result[name] = value
            continue
        own = name.removeprefix(base.group())
        if own == "router.thresholds":
            continue
        if own.startswith("shared_expert."):
            parts = [value.clone() for _ in range(ensemble_size)]
        elif value.shape[0] % ensemble_size:
            raise ValueError(
                f"{name} must have a multiple of ensemble_size={ensemble_size} experts, got {value.shape[0]}"
            )
        else:
            parts = value.chunk(ensemble_size)
        for member, part in enumerate(parts):
            result[f"{base.group()}members.{member}.{own}"] = part
    return result


def join_members(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_members`; other state dicts are left as they are."""
    result, members = {}, {}
    for name, value in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.mlp\.)members\.(\d+)\.(.*)", name)
        if found is None:
            result[name] = value
        else:
            members.setdefault(found[1] + found[3], {})[int(found[2])] = value
    return result | {name: _joined(name, [parts[m] for m in sorted(parts)]) for name, parts in members.items()}


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Of all members; a soft router's slots have the experts second, and its scale has none."""
    if name.endswith(".router.scale"):
        return torch.stack(parts)
    if len({part.shape for part in parts}) > 1:
        got = " and ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{name} must be of one shape in all members, got {got}")
    return torch.cat(parts, 1 if name.endswith(".router.mu") else 0)
