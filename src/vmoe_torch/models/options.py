"""Keyword arguments that the models pass on, for type checkers and editors."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from torch import nn

from vmoe_torch.layers.options import MoeOptions

Layer = str | Callable[..., nn.Module] | type[nn.Module]
MoeLayers = str | int | tuple[int, ...] | list[int]
PositionEmbedding = Literal["learn", "none", "sincos2d"]
WeightInit = Literal["", "jax", "jax_nlhb", "moco", "reset", "skip"]


class VisionTransformerOptions(TypedDict, total=False):
    """Those of timm's VisionTransformer that `VMoE` takes as they are; tests/models holds them against timm's."""

    img_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    in_chans: int
    num_classes: int
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"]
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    qk_norm: bool
    scale_attn_norm: bool
    proj_bias: bool
    init_values: float | None
    class_token: bool
    reg_tokens: int
    pre_norm: bool
    final_norm: bool
    pool_include_prefix: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    drop_rate: float
    pos_drop_rate: float
    patch_drop_rate: float
    proj_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float
    fix_init: bool
    embed_layer: Callable[..., nn.Module]
    embed_norm_layer: Layer | None
    norm_layer: Layer | None
    attn_layer: Layer
    device: torch.device | str | None
    dtype: torch.dtype | None


class VMoEOptions(MoeOptions, VisionTransformerOptions, total=False):
    """What `VMoE` takes beside `depth` and `moe_layers`."""

    representation_size: int | bool | None
    head_bias_init: float
    act_layer: Layer
    fc_norm: bool | None
    pos_embed: PositionEmbedding
    pos_embed_temperature: float
    no_embed_class: bool
    weight_init: WeightInit
