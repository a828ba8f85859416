"""V-MoE (arXiv 2106.05974): Vision Transformers with sparse MLPs, as timm models.

`VMoE` is timm's VisionTransformer whose chosen blocks hold a `MoeMlp`; everything else, keys included, is timm's.
Over 400 lines: timm wants a function for every registered model.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack, get_type_hints

import torch
from timm.layers import AttentionPoolLatent
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    named_apply,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from vmoe_kernels.common.checks import check_integer, check_number
from vmoe_torch.layers import ExpertLinear, MoeMlp
from vmoe_torch.layers import options as opt
from vmoe_torch.layers.choice import MODEL_KEY
from vmoe_torch.layers.int8_experts import refuse_int8
from vmoe_torch.models import description
from vmoe_torch.models.blocks import MoeBlock, parse_moe_layers
from vmoe_torch.models.initialisation import init_module
from vmoe_torch.models.options import Layer, MoeLayers, PositionEmbedding, VisionTransformerOptions, WeightInit
from vmoe_torch.models.position import TEMPERATURE, sincos2d
from vmoe_torch.models.variants import merged
from vmoe_torch.weights.adapt import checkpoint_filter_fn

__all__ = ["VMoE"]

register_notrace_module(MoeMlp)


class VMoE(vit.VisionTransformer):
    """Vision Transformer with sparse mixture-of-experts MLPs.

    timm's `create_model` leaves out arguments that are None, so every one has another value that means none.

    Takes every argument of timm's VisionTransformer except mlp_layer and scale_mlp_norm, those that
    `vmoe_torch.layers.options.MoeOptions` describes, and those below. What may change after training
    (`RoutingOptions`) may also be a dict with one value for each MoE layer, by the names of `vmoe_torch.moe_layers`:
    `timm.models.save_for_hf` writes so what `set_routing` and `set_budget` chose, and an argument given to
    `create_model` takes its place. So may num_experts, as `vmoe_torch.prune_experts` leaves it.

    Args:
        moe_layers: "every2", "last2" or block numbers.
        representation_size: width of a tanh layer before the head; None or 0 for none, True for the model's width.
        pos_embed: timm's "learn", "none", or "sincos2d" (fixed, patches only).
        pos_embed_temperature: the longest wave length over 2 pi of "sincos2d".
        head_bias_init: what the head's bias begins with; for the sigmoid loss, -log(num_classes).
        block_fn: makes a block; takes `moe_layers` and `moe` beside what timm gives it, as `MoeBlock`.
    """

    # How many members vote: `VMoEEnsemble` has others.
    ensemble_size: int = 1
    # What timm's factory gave beside its own arguments; None for a model that was made without it.
    made_with: dict[str, Any] | None = None

    def __init__(
        self,
        *args: Any,
        moe_layers: MoeLayers = "every2",
        num_experts: int | dict[str, int] = 32,
        expert_hidden: Sequence[int | float] | int | float | None = None,
        shared_expert_hidden: int | float | None = None,
        num_selected_experts: int | dict[str, int] = 2,
        capacity_factor: opt.CapacityFactor | dict[str, opt.CapacityFactor] = 1.05,
        eval_capacity_factor: opt.CapacityFactor | dict[str, opt.CapacityFactor] | None = None,
        capacity_rounding: opt.CapacityRounding = "ceil",
        capacity_multiple_of: int | None = 4,
        batch_priority: bool | dict[str, bool] = True,
        priority: opt.Priority | dict[str, opt.Priority] = "max",
        group_size: opt.GroupSize | dict[str, opt.GroupSize] = 8,
        mean_selected_experts: opt.MeanSelectedExperts | dict[str, opt.MeanSelectedExperts] = None,
        gate_threshold: float | dict[str, float | None] | None = None,
        noise_std: float | None = None,
        expert_drop: float | None = None,
        importance_loss_weight: float = 0.005,
        load_loss_weight: float = 0.005,
        gshard_loss_weight: float = 0.0,
        size_loss_weight: float = 0.0,
        router_z_loss_weight: float = 0.0,
        auxiliary_mode: opt.AuxiliaryMode = "injected",
        router: opt.RouterType = "top_experts",
        slots_per_expert: int | None = None,
        dispatch_dtype: opt.DispatchDtype | None = None,
        representation_size: int | bool | None = None,
        head_bias_init: float = 0.0,
        renormalize_gates: bool = False,
        impl: opt.Impl = "auto",
        depth: int = 12,
        act_layer: Layer = "gelu_tanh",
        fc_norm: bool | None = False,
        pos_embed: PositionEmbedding = "learn",
        pos_embed_temperature: float = TEMPERATURE,
        no_embed_class: bool = False,
        weight_init: WeightInit = "",
        **kwargs: Unpack[VisionTransformerOptions],
    ) -> None:
        # Before there is any other local name.
        given = locals()
        moe = {name: given[name] for name in get_type_hints(opt.MoeOptions)}
        head_bias_init = check_number("head_bias_init", head_bias_init, "a number")
        if representation_size is not None and not isinstance(representation_size, bool):
            representation_size = check_integer("representation_size", representation_size, 0, "True or at least 0")
        sincos = pos_embed == "sincos2d"
        temperature = check_number("pos_embed_temperature", pos_embed_temperature, "above 0", math.ulp(0.0))
        if not sincos and temperature != TEMPERATURE:
            raise ValueError(
                f"pos_embed_temperature must be {TEMPERATURE} unless pos_embed is 'sincos2d', got {temperature}"
            )
        blocks = parse_moe_layers(moe_layers, depth)
        moe, per_layer = description.by_layer(moe, blocks)
        super().__init__(
            *args,
            depth=depth,
            act_layer=act_layer,
            fc_norm=fc_norm,
            pos_embed="learn" if sincos else pos_embed,
            no_embed_class=no_embed_class or sincos,
            weight_init="skip",
            block_fn=partial(kwargs.pop("block_fn", MoeBlock), moe_layers=blocks, moe=moe),
            **kwargs,
        )
        for layer in self.modules():
            if isinstance(layer, MoeMlp):
                layer.own_router().fit(self.patch_embed.num_patches + self.num_prefix_tokens)
        if per_layer:
            description.choose_per_layer(self, per_layer)
        self.fixed_pos_embed = sincos
        self.pos_embed_temperature = temperature
        if sincos:
            self.pos_embed.requires_grad_(False)
        if len(self.blocks) > 0:
            _norm_queries_and_keys(self.attn_pool, self.blocks[0].attn)
        # The head stays the last module, as timm's tools expect.
        head, head_drop = self.head, self.head_drop
        del self.head, self.head_drop
        dd = _device_and_dtype(self)
        width = self.embed_dim if representation_size is True else representation_size
        self.pre_logits = nn.Sequential(nn.Linear(self.embed_dim, width, **dd), nn.Tanh()) if width else nn.Identity()
        if width:
            self.head_hidden_size = width
            head = nn.Linear(width, self.num_classes, **dd) if self.num_classes > 0 else head
        self.head_drop, self.head = head_drop, head

        self.head_bias_init = head_bias_init
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialises all weights; sound after `to_empty`.

        Args:
            mode: "" as the original V-MoE (Flax), or timm's "jax", "jax_nlhb", "moco" and "reset".
            needs_reset: whether modules that initialise themselves do it again.

        Raises:
            ValueError: if there is no such mode, or experts are int8; then nothing has changed.
        """
        mode = mode or self.weight_init_mode
        if mode not in ("", "jax", "jax_nlhb", "moco", "reset"):
            raise ValueError(f"weight_init must be '', 'jax', 'jax_nlhb', 'moco', 'reset' or 'skip', got {mode!r}")
        refuse_int8(self, "to be initialised")
        if mode:
            super().init_weights(mode, needs_reset)
            if mode == "moco":
                for module in self.modules():
                    if isinstance(module, ExpertLinear) and module.bias is not None:
                        nn.init.zeros_(module.bias)
        else:
            self._init_as_original(needs_reset)
        if self.head_bias_init and self.num_classes > 0:
            nn.init.constant_(self.head.bias, self.head_bias_init)
        if self.fixed_pos_embed:
            height, width = self.patch_embed.grid_size
            with torch.no_grad():
                self.pos_embed.copy_(sincos2d(height, width, self.embed_dim, self.pos_embed_temperature))

    def _init_as_original(self, needs_reset: bool) -> None:
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        named_apply(partial(init_module, needs_reset=needs_reset), self)
        if self.fix_init:
            self.fix_init_weight()

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """timm's, for experts of several sizes, too."""
        for index, block in enumerate(self.blocks):
            shared = block.mlp.shared_expert if isinstance(block.mlp, MoeMlp) else None
            last = block.mlp.fc2.linears() if isinstance(block.mlp, MoeMlp) else [block.mlp.fc2]
            for linear in (block.attn.proj, *last, *(() if shared is None else (shared.fc2,))):
                linear.weight.div_(math.sqrt(2.0 * (index + 1)))

    @torch.jit.unused
    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm writes as model_args (since 1.0.31): its own record, with the routing and the slots of now."""
        return description.as_it_is(self, self.__dict__.get("_model_args", {}))

    @_model_args.setter
    def _model_args(self, value: dict[str, Any]) -> None:
        # timm adds to what it reads: the routing of that moment is not part of its record.
        record, chosen = self.__dict__.get("_model_args", {}), description.routing_arguments(self)
        kept = {name: record[name] for name in chosen if name in record}
        self.__dict__["_model_args"] = {k: v for k, v in value.items() if k not in chosen} | kept

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        found = None if metadata is None else description.describe(self)
        if found is not None:
            metadata[MODEL_KEY] = found

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        described = local_metadata.get(MODEL_KEY)
        own, given = tuple(self.patch_embed.grid_size), described and tuple(described["grid"])
        position = state_dict.get(f"{prefix}pos_embed")
        alike = position is not None and self.pos_embed is not None and position.shape == self.pos_embed.shape
        if alike and given not in (None, own):
            # As many positions, yet of other places: load_pretrained resizes them.
            args[-1].append(f"{prefix}pos_embed must be of a grid of {own}, got one of {given}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's set, the experts' biases, which are 2-D, and soft routers' slots, of which only directions count."""
        own = {"blocks.*.mlp.fc1.bias", "blocks.*.mlp.fc2.bias", "blocks.*.mlp.router.mu"}
        return super().no_weight_decay() | own | {"blocks.*.mlp.fc1.*.bias", "blocks.*.mlp.fc2.*.bias"}

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Loads the original's weights (timm's `custom_load`) or any others, adapting resolution, channels and head.

        The routing that was chosen for the weights comes with them, where the file says it.

        Args:
            checkpoint_path: what `vmoe_torch.checkpoints.read_weights` reads.
            prefix: what the names of the wanted arrays in an .npz begin with.

        Raises:
            ValueError: if the file is damaged or does not fit the model.
        """
        # What reads files is loaded when there is one to read.
        from vmoe_torch.weights.sources import load_original

        load_original(checkpoint_path, self, array_prefix=prefix)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head on top of the pre-logits layer, where there is one; initialised as the first one was."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **_device_and_dtype(self))
            self.head.train(self.training)
        if num_classes > 0 and not self.weight_init_mode:
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, self.head_bias_init)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's, which cuts the blocks after the last index; the pre-logits layer goes with the head."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.embed_dim
        return take_indices

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """timm's, which resamples learned positions; fixed ones are computed anew."""
        super().set_input_size(img_size, patch_size)
        if self.fixed_pos_embed:
            height, width = self.patch_embed.grid_size
            self.pos_embed.data.copy_(sincos2d(height, width, self.embed_dim, self.pos_embed_temperature))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools, applies the tanh layer where there is one, and classifies."""
        x = self.pre_logits(self.fc_norm(self.pool(x)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


def _norm_queries_and_keys(pool: nn.Module, attention: nn.Module) -> None:
    """With qk_norm the original's attention pooling norms its queries and keys as a block does; timm's does not."""
    norm = getattr(attention, "q_norm", nn.Identity())
    if isinstance(pool, AttentionPoolLatent) and not isinstance(norm, nn.Identity):
        pool.q_norm, pool.k_norm = copy.deepcopy(attention.q_norm), copy.deepcopy(attention.k_norm)


def _device_and_dtype(module: nn.Module) -> dict[str, Any]:
    """Those of a module's first parameter, as the keyword arguments of a layer that joins it."""
    parameter = next(module.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


def vmoe_cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """What timm knows of a model's data and weights; the original's preprocessing."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def released_cfg(prefix: str, **kwargs: Any) -> dict[str, Any]:
    """Of a checkpoint in the original's public bucket."""
    source = "https://github.com/google-research/vmoe"
    return vmoe_cfg(f"{BUCKET}/{prefix}", custom_load=True, origin_url=source, paper_ids="arXiv:2106.05974", **kwargs)


# gs://vmoe_checkpoints, readable by everyone.
BUCKET = "https://storage.googleapis.com/vmoe_checkpoints"
_TEST = {"input_size": (3, 160, 160)}
# Fine-tuned and evaluated on whole images, squashed to a square.
_SQUASHED_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0, "crop_mode": "squash"}

default_cfgs = generate_default_cfgs(
    {
        "vmoe_s32.untrained": vmoe_cfg(),
        "vmoe_b32.untrained": vmoe_cfg(),
        "vmoe_b16.untrained": vmoe_cfg(),
        "vmoe_l32.untrained": vmoe_cfg(),
        "vmoe_l32_last2.untrained": vmoe_cfg(),
        "vmoe_l16.untrained": vmoe_cfg(),
        "vmoe_l16_last2.untrained": vmoe_cfg(),
        "vmoe_h14.untrained": vmoe_cfg(),
        "vmoe_h14_last5.untrained": vmoe_cfg(),
        "vmoe_15b.untrained": vmoe_cfg(num_classes=29593),
        "vmoe_s32_last2_e8.randaug_light1_in1k": released_cfg("vmoe_s32_last2_ilsvrc2012_randaug_light1"),
        "vmoe_s32_last2_e8.randaug_medium_in1k": released_cfg("vmoe_s32_last2_ilsvrc2012_randaug_medium"),
        "vmoe_s32_last2_e8_384.randaug_light1_in1k_ft_in1k": released_cfg(
            "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012", **_SQUASHED_384
        ),
        "vmoe_b16_e8.randaug_strong_in21k": released_cfg("vmoe_b16_imagenet21k_randaug_strong", num_classes=21843),
        "vmoe_b16_e8_384.randaug_strong_in21k_ft_in1k": released_cfg(
            "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012", **_SQUASHED_384
        ),
        "vmoe_dense_s32.untrained": vmoe_cfg(),
        "test_vmoe.untrained": vmoe_cfg(**_TEST),
        "test_vmoe2.untrained": vmoe_cfg(**_TEST),
    }
)

_S = {"embed_dim": 512, "depth": 8, "num_heads": 8}
_B = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_L = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_H = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
# What the released models were trained with.
_RELEASED = {"num_experts": 8, "batch_priority": False, "dispatch_dtype": "bfloat16"}
_TINY = {"patch_size": 16, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0, "num_experts": 4}


def create_vmoe(variant: str, pretrained: bool = False, model_cls: type[VMoE] = VMoE, **kwargs: Any) -> VMoE:
    """timm's way to a model; weights of a file or URL are those that `VMoE.load_pretrained` finds there."""
    out_indices = kwargs.pop("out_indices", 3)
    if pretrained:
        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        # A folder of the Hub is timm's own matter.
        if not (cfg.state_dict or cfg.source) and (cfg.file or (cfg.url and not cfg.hf_hub_id)):
            from vmoe_torch.weights.pretrained import cached_checkpoint

            file = cfg.file or str(cached_checkpoint(cfg.url, kwargs.get("cache_dir")))
            kwargs["pretrained_cfg_overlay"] = overlay | {"file": file, "custom_load": True}
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
    if isinstance(model, VMoE):
        model.made_with = description.constructor_arguments(kwargs)
    return model


@register_model
def vmoe_s32(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-S/32, every 2: 8 layers of width 512 (not timm's vit_small)."""
    return create_vmoe("vmoe_s32", pretrained, **{**_S, "patch_size": 32, **kwargs})


@register_model
def vmoe_b32(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-B/32, every 2."""
    return create_vmoe("vmoe_b32", pretrained, **{**_B, "patch_size": 32, **kwargs})


@register_model
def vmoe_b16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-B/16, every 2."""
    return create_vmoe("vmoe_b16", pretrained, **{**_B, "patch_size": 16, **kwargs})


@register_model
def vmoe_l32(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-L/32, every 2."""
    return create_vmoe("vmoe_l32", pretrained, **{**_L, "patch_size": 32, **kwargs})


@register_model
def vmoe_l32_last2(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-L/32, last 2."""
    return create_vmoe("vmoe_l32_last2", pretrained, **{**_L, "patch_size": 32, "moe_layers": "last2", **kwargs})


@register_model
def vmoe_l16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-L/16, every 2."""
    return create_vmoe("vmoe_l16", pretrained, **{**_L, "patch_size": 16, **kwargs})


@register_model
def vmoe_l16_last2(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-L/16, last 2."""
    return create_vmoe("vmoe_l16_last2", pretrained, **{**_L, "patch_size": 16, "moe_layers": "last2", **kwargs})


@register_model
def vmoe_h14(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-H/14, every 2."""
    return create_vmoe("vmoe_h14", pretrained, **{**_H, "patch_size": 14, **kwargs})


@register_model
def vmoe_h14_last5(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-H/14, last 5."""
    return create_vmoe("vmoe_h14_last5", pretrained, **{**_H, "patch_size": 14, "moe_layers": "last5", **kwargs})


@register_model
def vmoe_15b(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """V-MoE-15B: 48 layers of width 1408, 24 of them sparse."""
    args = {"patch_size": 14, "embed_dim": 1408, "depth": 48, "num_heads": 16, "mlp_ratio": 6400 / 1408}
    return create_vmoe("vmoe_15b", pretrained, **{**args, **kwargs})


@register_model
def vmoe_s32_last2_e8(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """The released V-MoE-S/32, last 2, E=8: trained at capacity 1.05, evaluated at 4.0, tanh layer before the head."""
    args = {"patch_size": 32, "moe_layers": "last2", "eval_capacity_factor": 4.0, "representation_size": True}
    return create_vmoe("vmoe_s32_last2_e8", pretrained, **merged({**_S, **_RELEASED, **args}, kwargs))


@register_model
def vmoe_b16_e8(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """The released V-MoE-B/16, every 2, E=8."""
    return create_vmoe("vmoe_b16_e8", pretrained, **merged({**_B, **_RELEASED, "patch_size": 16}, kwargs))


@register_model
def vmoe_s32_last2_e8_384(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """The released V-MoE-S/32, last 2, E=8, fine-tuned at 384 px: capacity 1.5, no tanh layer."""
    args = {"patch_size": 32, "img_size": 384, "moe_layers": "last2", "capacity_factor": 1.5}
    return create_vmoe("vmoe_s32_last2_e8_384", pretrained, **merged({**_S, **_RELEASED, **args}, kwargs))


@register_model
def vmoe_b16_e8_384(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """The released V-MoE-B/16, every 2, E=8, fine-tuned at 384 px: capacity 1.5."""
    args = {"patch_size": 16, "img_size": 384, "capacity_factor": 1.5}
    return create_vmoe("vmoe_b16_e8_384", pretrained, **merged({**_B, **_RELEASED, **args}, kwargs))


@register_model
def vmoe_dense_s32(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-S/32 as the paper has it, the dense counterpart of vmoe_s32, which timm lacks."""
    return create_vmoe("vmoe_dense_s32", pretrained, **{**_S, "patch_size": 32, "moe_layers": (), **kwargs})


@register_model
def test_vmoe(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """A tiny V-MoE for tests."""
    return create_vmoe("test_vmoe", pretrained, **{**_TINY, "depth": 6, **kwargs})


@register_model
def test_vmoe2(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """A tiny V-MoE for tests: average pooling, registers, tanh layer, layer scale, K=1."""
    args = {
        "depth": 8,
        "class_token": False,
        "global_pool": "avg",
        "reg_tokens": 1,
        "representation_size": True,
        "init_values": 1e-5,
        "num_selected_experts": 1,
    }
    return create_vmoe("test_vmoe2", pretrained, **merged({**_TINY, **args}, kwargs))
