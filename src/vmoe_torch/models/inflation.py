"""Video models from image models (arXiv 2103.15691, section 3.4): the patch embedding gets frames, the rest stays."""

import copy
import math
import os
from typing import Any, Literal

import timm
import torch
from timm.layers import GELUTanh, LayerScale, Mlp, PatchEmbed, QuickGELU
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from vmoe_kernels.common.checks import check_integer
from vmoe_torch.layers import MoeMlp
from vmoe_torch.models import description
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.ensemble import VMoEEnsemble
from vmoe_torch.models.video import VideoVMoE
from vmoe_torch.models.vmoe import VMoE
from vmoe_torch.weights.sources import is_weights, read_weights
from vmoe_torch.weights.tubelets import MODES, InflationMode, inflated_kernel, repeated_positions

Positions = Literal["repeated", "factorised"]
# The video model of our own of this width.
_NAMES = {512: "vmoe_video_s16", 1024: "vmoe_video_l16"}
# What goes over as it is.
_PARTS = ("cls_token", "reg_token", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm")
_PARTS += ("head_drop", "head")
_CFG = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license")


@torch.no_grad()
def inflate(
    model: str | os.PathLike | nn.Module,
    frames: int = 16,
    mode: InflationMode = "central",
    *,
    tubelet_size: int = 2,
    positions: Positions = "repeated",
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
) -> VideoVMoE:
    """A video model that begins as an image model: a clip of one repeated frame has the image's patch tokens.

    Blocks, norms and head go over as they are, routing included; but groups are single clips, which `set_routing`
    changes. With mode "central" the patch tokens are the image's bit for bit, with "average" to rounding.

    Args:
        model: a model, which is copied, not changed: a V-MoE, a dense timm VisionTransformer or what `upcycle` makes of
            one; a timm model's name; or the weights of one, as `vmoe_torch.checkpoints.read_weights` reads them.
        frames: T of the clips, a multiple of tubelet_size.
        mode: what the kernel of a tubelet begins with: "central", the image's at frame tubelet_size // 2 and zeros
            elsewhere; "average", the image's over tubelet_size at every frame.
        tubelet_size: frames of a tubelet.
        positions: "repeated", a position for every tubelet, which begins as that of its place; "factorised", the sum of
            that of its place, as in the image model, and one for its time, which begins at 0.
        pretrained: whether the named model gets its pretrained weights.
        model_args: what else `timm.create_model` gets for the named model.

    Returns:
        A `VideoVMoE` in the same mode, dtype and on the same device. Its state dict says how to make it again where the
        arguments of a `VideoVMoE` can.

    Raises:
        ValueError: if the model is none of these, or an argument is off.
    """
    tubelet_size = check_integer("tubelet_size", tubelet_size, 1)
    rule = f"a positive multiple of tubelet_size={tubelet_size}"
    frames = check_integer("frames", frames, 1, rule)
    for name, value, words in (("mode", mode, MODES), ("positions", positions, ("repeated", "factorised"))):
        if value not in words:
            raise ValueError(f"{name} must be one of {words}, got {value!r}")
    if frames % tubelet_size:
        raise ValueError(f"frames must be {rule}, got {frames}")
    if isinstance(model, str) and (model.startswith("hf-hub:") or (timm.is_model(model) and not is_weights(model))):
        image = timm.create_model(model, pretrained=pretrained, **(model_args or {}))
    elif pretrained or model_args:
        got = f"a {type(model).__name__}" if isinstance(model, nn.Module) else model
        raise ValueError(f"pretrained and model_args must go with a model's name, got {got}")
    else:
        image = model if isinstance(model, nn.Module) else open_weights(read_weights(model))[0]
    _check(image)
    made = _arguments(image) | {"num_frames": frames, "tubelet_size": tubelet_size, "group_size": "image"}
    made["pos_embed"] = "none" if image.pos_embed is None else {"repeated": "learn"}.get(positions, positions)
    cfg = getattr(image, "pretrained_cfg", None) or {}
    overlay = {key: cfg[key] for key in _CFG if key in cfg}
    overlay |= {"num_frames": frames, "input_size": (image.in_chans, *image.patch_embed.img_size)}
    name = _NAMES.get(image.embed_dim, "vmoe_video_b16")
    video = timm.create_model(name, **made, pretrained_cfg_overlay=overlay, device="meta")
    shell = _structure(video)
    for part in (*_PARTS, *(("pre_logits",) if isinstance(image, VMoE) else ())):
        setattr(video, part, copy.deepcopy(getattr(image, part)))
    for layer in (module for module in video.blocks.modules() if isinstance(module, MoeMlp)):
        layer.set_routing(**{**layer.routing(), "group_size": "image"})
    _embed(video, image, mode)
    if _structure(video) != shell:
        # No arguments of a VideoVMoE make such blocks.
        video.made_with = None
    video.grad_checkpointing = image.grad_checkpointing
    return video.train(image.training)


def _check(image: nn.Module) -> None:
    kind = type(image).__name__
    if isinstance(image, VideoVMoE | VMoEEnsemble) or not (
        isinstance(image, VMoE) or type(image) is vit.VisionTransformer
    ):
        raise ValueError(f"model must be a V-MoE of images or timm's VisionTransformer to be inflated, got {kind}")
    embed = image.patch_embed
    if not isinstance(embed, PatchEmbed) or embed.img_size is None:
        raise ValueError(
            f"model must have timm's PatchEmbed, of a known img_size, got {type(embed).__name__} in {kind}"
        )


def _arguments(image: nn.Module) -> dict[str, Any]:
    """The arguments of a `VideoVMoE` with these parts, as far as they can be told."""
    if isinstance(image, VMoE) and image.made_with is not None:
        apart = ("pos_embed_temperature", "dynamic_img_size", "dynamic_img_pad")
        found = {name: value for name, value in description.model_arguments(image).items() if name not in apart}
        return found | {"no_embed_class": image.no_embed_class}
    embed, block = image.patch_embed, image.blocks[0]
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    found = {
        "img_size": tuple(embed.img_size),
        "patch_size": embed.patch_size[0] if embed.patch_size[0] == embed.patch_size[1] else tuple(embed.patch_size),
        "in_chans": image.in_chans,
        "num_classes": image.num_classes,
        "global_pool": image.global_pool,
        "embed_dim": image.embed_dim,
        "depth": len(image.blocks),
        "num_heads": getattr(attention, "num_heads", 1),
        "qkv_bias": getattr(getattr(attention, "qkv", None), "bias", None) is not None,
        "qk_norm": not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity),
        "moe_layers": [],
        "class_token": image.has_class_token,
        "reg_tokens": image.num_reg_tokens,
        "no_embed_class": image.no_embed_class,
        "pool_include_prefix": image.pool_include_prefix,
        "pre_norm": not isinstance(image.norm_pre, nn.Identity),
        "fc_norm": not isinstance(image.fc_norm, nn.Identity),
        "final_norm": not all(isinstance(norm, nn.Identity) for norm in (image.norm, image.fc_norm)),
    }
    if isinstance(mlp, Mlp):
        # A hair more, as timm rounds down what may come out just below.
        found["mlp_ratio"] = math.nextafter(mlp.fc1.out_features / image.embed_dim, math.inf)
        found["act_layer"] = {GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}.get(type(mlp.act), "gelu")
    if isinstance(getattr(block, "ls1", None), LayerScale):
        found["init_values"] = 1.0
    return found


def _structure(model: nn.Module) -> tuple:
    """What two models share that compute alike: their modules in words, without dropout, and their weights' shapes."""
    # Two names of one thing.
    text = str(model).replace("MoeBlock(", "Block(").replace("GELU(approximate='none')", "GELU()")
    modules = tuple(line for line in text.splitlines() if "drop" not in line.lower())
    return modules, {name: value.shape for name, value in model.state_dict().items()}


def _embed(video: VideoVMoE, image: nn.Module, mode: InflationMode) -> None:
    """The patches and positions of a video model whose own are on the meta device."""
    proj, prefix = image.patch_embed.proj, video.position_prefix
    video.patch_embed.proj.weight = _like(inflated_kernel(proj.weight, video.tubelet_size, mode), proj.weight)
    video.patch_embed.proj.bias = copy.deepcopy(proj.bias)
    video.patch_embed.norm = copy.deepcopy(image.patch_embed.norm)
    if image.pos_embed is None:
        return
    steps, position = video.patch_embed.num_steps, image.pos_embed
    if video.pos_embed_time is None:
        video.pos_embed = nn.Parameter(repeated_positions(position, prefix, steps))
    else:
        video.pos_embed = nn.Parameter(position.clone())
        video.pos_embed_time = nn.Parameter(position.new_zeros(1, steps, video.embed_dim))


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
