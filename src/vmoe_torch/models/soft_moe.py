"""The models of Soft MoE (arXiv 2308.00951), and those with expert choice that its paper sets beside them.

Both are Vision Transformers whose blocks of the second half have experts; without class token, pooled by the average,
with normalised queries and keys. The original's weights were not released.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from vmoe_torch.models.variants import merged
from vmoe_torch.models.vmoe import VMoE, create_vmoe, vmoe_cfg

_PAPER = {"origin_url": "https://github.com/google-research/vmoe", "paper_ids": "arXiv:2308.00951"}
_TEST = {"input_size": (3, 160, 160)}

default_cfgs = generate_default_cfgs(
    {
        "soft_moe_s16.untrained": vmoe_cfg(**_PAPER),
        "soft_moe_s14.untrained": vmoe_cfg(**_PAPER),
        "soft_moe_b16.untrained": vmoe_cfg(**_PAPER),
        "soft_moe_l16.untrained": vmoe_cfg(**_PAPER),
        "soft_moe_h14.untrained": vmoe_cfg(**_PAPER),
        "expert_choice_s16.untrained": vmoe_cfg(**_PAPER),
        "expert_choice_s14.untrained": vmoe_cfg(**_PAPER),
        "expert_choice_b16.untrained": vmoe_cfg(**_PAPER),
        "expert_choice_l16.untrained": vmoe_cfg(**_PAPER),
        "expert_choice_h14.untrained": vmoe_cfg(**_PAPER),
        "test_soft_moe.untrained": vmoe_cfg(**_TEST),
        "test_expert_choice.untrained": vmoe_cfg(**_TEST),
    }
)

_S16 = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "num_experts": 128}
_S14 = {**_S16, "patch_size": 14, "num_experts": 256}
_B16 = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "num_experts": 128}
_L16 = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, "num_experts": 128}
_H14 = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, "num_experts": 256}
_TINY = {"patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0, "num_experts": 4}
_SOFT = {"router": "soft", "slots_per_expert": 1}
# As many slots as the tokens of an image, to the nearest whole number for each expert.
_EXPERT_CHOICE = {
    "router": "expert_choice",
    "group_size": "image",
    "capacity_factor": 1.0,
    "capacity_rounding": "round",
    "capacity_multiple_of": 1,
}


def _create(
    variant: str, pretrained: bool, size: dict[str, Any], layer: dict[str, Any], kwargs: dict[str, Any]
) -> VMoE:
    args = merged({"class_token": False, "global_pool": "avg", "qk_norm": True, **size, **layer}, kwargs)
    args.setdefault("moe_layers", tuple(range(args["depth"] // 2, args["depth"])))
    return create_vmoe(variant, pretrained, **args)


@register_model
def soft_moe_s16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Soft MoE S/16: 128 experts of one slot in blocks 6 to 11."""
    return _create("soft_moe_s16", pretrained, _S16, _SOFT, kwargs)


@register_model
def soft_moe_s14(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Soft MoE S/14: 256 experts of one slot in blocks 6 to 11."""
    return _create("soft_moe_s14", pretrained, _S14, _SOFT, kwargs)


@register_model
def soft_moe_b16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Soft MoE B/16: 128 experts of one slot in blocks 6 to 11."""
    return _create("soft_moe_b16", pretrained, _B16, _SOFT, kwargs)


@register_model
def soft_moe_l16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Soft MoE L/16: 128 experts of one slot in blocks 12 to 23."""
    return _create("soft_moe_l16", pretrained, _L16, _SOFT, kwargs)


@register_model
def soft_moe_h14(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Soft MoE H/14: 256 experts of one slot in blocks 16 to 31."""
    return _create("soft_moe_h14", pretrained, _H14, _SOFT, kwargs)


@register_model
def expert_choice_s16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Expert choice S/16: 128 experts in blocks 6 to 11, with about as many slots as an image has tokens."""
    return _create("expert_choice_s16", pretrained, _S16, _EXPERT_CHOICE, kwargs)


@register_model
def expert_choice_s14(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Expert choice S/14: 256 experts in blocks 6 to 11, with about as many slots as an image has tokens."""
    return _create("expert_choice_s14", pretrained, _S14, _EXPERT_CHOICE, kwargs)


@register_model
def expert_choice_b16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Expert choice B/16: 128 experts in blocks 6 to 11, with about as many slots as an image has tokens."""
    return _create("expert_choice_b16", pretrained, _B16, _EXPERT_CHOICE, kwargs)


@register_model
def expert_choice_l16(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Expert choice L/16: 128 experts in blocks 12 to 23, with about as many slots as an image has tokens."""
    return _create("expert_choice_l16", pretrained, _L16, _EXPERT_CHOICE, kwargs)


@register_model
def expert_choice_h14(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """Expert choice H/14: 256 experts in blocks 16 to 31, with about as many slots as an image has tokens."""
    return _create("expert_choice_h14", pretrained, _H14, _EXPERT_CHOICE, kwargs)


@register_model
def test_soft_moe(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """A tiny Soft MoE for tests."""
    return _create("test_soft_moe", pretrained, _TINY, _SOFT, kwargs)


@register_model
def test_expert_choice(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """A tiny model with expert choice for tests."""
    return _create("test_expert_choice", pretrained, _TINY, _EXPERT_CHOICE, kwargs)
