"""Keyword arguments that the models pass on, for type checkers and editors."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from torch import nn

from vmoe_torch.layers.options import MoeOptions

Layer = str | Callable[..., nn.Module] | type[nn.Module]
MoeLayers = str | int | tuple[int, ...] | list[int]
PositionEmbedding = Literal["learn", "none", "sincos2d"]
VideoPositionEmbedding = Literal["learn", "factorised", "none"]
WeightInit = Literal["", "jax", "jax_nlhb", "moco", "reset", "skip"]


class VisionTransformerOptions(TypedDict, total=False):
    """Those of timm's VisionTransformer that `VMoE` takes as they are; tests/models holds them against timm's."""

    img_size: int | tuple[int, int]
    """Height and width of the images in pixels."""
    patch_size: int | tuple[int, int]
    """Height and width of a patch in pixels."""
    in_chans: int
    """Channels of the images."""
    num_classes: int
    """Classes; 0 leaves out the head."""
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"]
    """What the head sees of the tokens; "" is all of them."""
    embed_dim: int
    """D, width of the tokens."""
    num_heads: int
    """Attention heads; they divide D."""
    mlp_ratio: float
    """Width of the MLPs and experts over D."""
    qkv_bias: bool
    """Whether queries, keys and values have biases."""
    qk_norm: bool
    """Whether queries and keys are normalised."""
    scale_attn_norm: bool
    """Whether the attention's output is normalised before its projection."""
    proj_bias: bool
    """Whether the attention's projection and the MLPs have biases."""
    init_values: float | None
    """What layer scale begins with; None is without."""
    class_token: bool
    """Whether there is a class token."""
    reg_tokens: int
    """Number of register tokens."""
    pre_norm: bool
    """Norm before the blocks, as in CLIP."""
    final_norm: bool
    """Norm after the blocks."""
    pool_include_prefix: bool
    """Whether class and register tokens are pooled, too."""
    dynamic_img_size: bool
    """Whether images may have other sizes."""
    dynamic_img_pad: bool
    """Whether images are padded to whole patches."""
    drop_rate: float
    """Dropout before the head, in [0, 1)."""
    pos_drop_rate: float
    """Dropout after the position embedding, in [0, 1)."""
    patch_drop_rate: float
    """Share of the patches that training leaves out, in [0, 1)."""
    proj_drop_rate: float
    """Dropout of the attention's projection and the MLPs, in [0, 1)."""
    attn_drop_rate: float
    """Dropout of the attention's weights, in [0, 1)."""
    drop_path_rate: float
    """Share of the samples for which training leaves out the last block, in [0, 1); it falls to 0 towards the first."""
    fix_init: bool
    """Whether weights begin smaller the deeper their block."""
    embed_layer: Callable[..., nn.Module]
    """What makes tokens of patches."""
    embed_norm_layer: Layer | None
    """Norm of the patches' tokens; None is without."""
    norm_layer: Layer | None
    """Norm of the blocks; None is a LayerNorm with eps=1e-6."""
    attn_layer: Layer
    """Attention of the blocks."""
    device: torch.device | str | None
    """Where the parameters are made."""
    dtype: torch.dtype | None
    """dtype of the parameters."""


class VMoEOptions(MoeOptions, VisionTransformerOptions, total=False):
    """What `VMoE` takes beside `depth` and `moe_layers`."""

    representation_size: int | bool | None
    """Width of a tanh layer before the head; None or 0 for none, True for the model's width."""
    head_bias_init: float
    """What the head's bias begins with; for the sigmoid loss, -log(num_classes)."""
    act_layer: Layer
    """Activation of the MLPs and experts."""
    fc_norm: bool | None
    """Norm after the pooling instead of after the blocks; None is so for "avg", "avgmax" and "max"."""
    pos_embed: PositionEmbedding
    """One of "learn", "none", or "sincos2d" (fixed, patches only)."""
    pos_embed_temperature: float
    """The longest wave length over 2 pi of "sincos2d"."""
    no_embed_class: bool
    """Whether class and register tokens have no position."""
    weight_init: WeightInit
    """timm's scheme of the first weights."""
