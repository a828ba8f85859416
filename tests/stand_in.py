"""A small V-MoE of videos for tests of what lies around such models: tubelets, tokens frame by frame."""

from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

from vmoe_torch.models import VMoE
from vmoe_torch.train.arguments import FACTORY


class Tubelets(nn.Module):
    """(B, C, T, H, W) -> (B, T/t * H/p * W/p, D)."""

    def __init__(self, frames: int, tubelet: int, image: nn.Module):
        super().__init__()
        before = image.proj
        self.patch_size, self.img_size = image.patch_size, image.img_size
        self.grid_size = (frames // tubelet, *image.grid_size)
        size = (tubelet, *self.patch_size)
        self.proj = nn.Conv3d(before.in_channels, before.out_channels, size, stride=size)

    def forward(self, clips: Tensor) -> Tensor:
        return self.proj(clips).flatten(2).transpose(1, 2)


class StandInVideo(VMoE):
    """Tokens by time, then by row and column."""

    def __init__(self, *args: Any, num_frames: int = 4, tubelet_size: int = 2, **kwargs: Any):
        super().__init__(*args, **{"group_size": "image", "class_token": False, "global_pool": "avg", **kwargs})
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.patch_embed = Tubelets(num_frames, tubelet_size, self.patch_embed)
        tokens = self.num_prefix_tokens + torch.Size(self.patch_embed.grid_size).numel()
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, self.embed_dim) * 0.02)


@register_model
def stand_in_video(pretrained: bool = False, **kwargs: Any) -> StandInVideo:
    """48 tokens of clips of 4 frames, 32 x 48 pixels."""
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    experts = {"moe_layers": "every1", "num_experts": 4, "mlp_ratio": 1.0, "capacity_multiple_of": 1}
    kwargs = {name: value for name, value in kwargs.items() if name not in FACTORY}
    model = StandInVideo(**{**sizes, **experts, **kwargs})
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


NAME = "stand_in_video"


def video_model(**changes: Any) -> nn.Module:
    """The model with random weights."""
    return timm.create_model(NAME, **changes)
