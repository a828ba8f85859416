"""A small V-MoE of videos, for tests of what lies around such models."""

from typing import Any

import timm
from timm.models import register_model
from torch import nn

from vmoe_torch.models import VideoVMoE
from vmoe_torch.train.arguments import FACTORY


@register_model
def tiny_vmoe_video(pretrained: bool = False, **kwargs: Any) -> VideoVMoE:
    """48 tokens of clips of 4 frames, 32 x 48 pixels."""
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    sizes |= {"num_frames": 4, "tubelet_size": 2, "class_token": False, "global_pool": "avg"}
    experts = {"moe_layers": "every1", "num_experts": 4, "mlp_ratio": 1.0, "capacity_multiple_of": 1}
    kwargs = {name: value for name, value in kwargs.items() if name not in FACTORY}
    model = VideoVMoE(**{**sizes, **experts, **kwargs})
    model.pretrained_cfg = {
        "input_size": (3, 32, 48),
        "num_frames": model.num_frames,
        "frame_stride": 2,
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return model


NAME = "tiny_vmoe_video"


def video_model(**changes: Any) -> nn.Module:
    """The model with random weights."""
    return timm.create_model(NAME, **changes)
