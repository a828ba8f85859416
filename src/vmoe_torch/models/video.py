"""V-MoE over space and time: a joint space-time Vision Transformer on tubelets, as VideoMAE v2 (arXiv 2303.16727) and
V-JEPA 2 (arXiv 2506.09985), with the MoE layers of `VMoE` as they are.

Dims: B clips, C channels, T frames, t frames of a tubelet, N = T / t tubelets at a place, S patches of a frame, D
width.
The tokens of a clip are the prefix tokens, then N * S patches, one time after another.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, lecun_normal_
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from vmoe_kernels.common.checks import check_integer
from vmoe_torch.layers.options import GroupSize
from vmoe_torch.models.options import VideoPositionEmbedding, VMoEOptions, WeightInit
from vmoe_torch.models.vmoe import VMoE, create_vmoe, vmoe_cfg
from vmoe_torch.weights.tubelets import zoom_clip_position, zoom_kernel, zoom_time

__all__ = ["VideoVMoE"]


class TubeletConv(nn.Conv3d):
    """nn.Conv3d over tubelets, one after another, computed as a Conv2d for each of their frames.

    So a kernel that is 0 but for the central frame, t // 2, gives what the image's Conv2d gives, bit for bit.
    """

    def __init__(self, in_chans: int, dim: int, tubelet_size: int, patch_size: tuple[int, int], **kwargs: Any) -> None:
        size = (tubelet_size, *patch_size)
        super().__init__(in_chans, dim, kernel_size=size, stride=size, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        tubelet, patch = self.kernel_size[0], [self.kernel_size[1], self.kernel_size[2]]
        central = tubelet // 2
        # (B * N, C, t, H, W)
        tubelets = x.unflatten(2, [-1, tubelet]).transpose(1, 2).flatten(0, 1)
        y = F.conv2d(tubelets[:, :, central], self.weight[:, :, central], self.bias, patch)
        for frame in range(tubelet):
            if frame != central:
                y = y + F.conv2d(tubelets[:, :, frame], self.weight[:, :, frame], None, patch)
        return y.unflatten(0, [x.shape[0], x.shape[2] // tubelet]).transpose(1, 2)


@torch.fx.wrap
def _as_clips(x: Tensor, channels: int, tubelet: int, size: list[int]) -> Tensor:
    """Clips as they are, images as clips of one tubelet; whatever is neither of the model's size is refused.

    A function of its own, as tracers must not look into it.
    """
    if not torch.jit.is_scripting():
        _check_clips(tuple(x.shape), channels, tubelet, tuple(size))
    return x.unsqueeze(2).expand(-1, -1, tubelet, -1, -1) if x.dim() == 4 else x


@torch.jit.unused
def _check_clips(shape: tuple[int, ...], channels: int, tubelet: int, size: tuple[int, ...]) -> None:
    if len(shape) not in (4, 5):
        raise ValueError(f"clips must be (B, C, T, H, W), or images (B, C, H, W), got {shape}")
    kind, axes = ("clips", "(B, C, T, H, W)") if len(shape) == 5 else ("images", "(B, C, H, W)")
    if shape[1] != channels:
        hints = {
            (5, 2): ": they look like (B, T, C, H, W), which x.transpose(1, 2) turns",
            (5, 4): ": they look like (B, T, H, W, C), which x.permute(0, 4, 1, 2, 3) turns",
            (4, 0): ": it looks like one clip (C, T, H, W), which x.unsqueeze(0) makes a batch of",
            (4, 3): ": they look like (B, H, W, C), which x.permute(0, 3, 1, 2) turns",
        }
        found = (text for (dims, at), text in hints.items() if dims == len(shape) and shape[at] == channels)
        raise ValueError(f"{kind} must be {axes} with C={channels}, got {shape}{next(found, '')}")
    if len(shape) == 5 and (shape[2] < 1 or shape[2] % tubelet):
        raise ValueError(f"T of clips must be a positive multiple of tubelet_size={tubelet}, got {shape[2]} in {shape}")
    if shape[-2:] != size:
        raise ValueError(
            f"{kind} must be {axes} with H, W = {size[0]}, {size[1]}, got {shape}; set_input_size changes it"
        )


class TubeletEmbed(PatchEmbed):
    """timm's PatchEmbed for clips: tokens of tubelets of t frames and a patch each.

    Args:
        img_size: height and width of the frames.
        patch_size: height and width of a patch.
        in_chans: C.
        embed_dim: D.
        norm_layer: of the tokens; None is without.
        bias: whether the projection has one.
        dynamic_img_pad: must be False.
        num_frames: T of the clips, a multiple of tubelet_size.
        tubelet_size: t.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (B, C, T, H, W) -> (B, N * S, D), one time after another; T may be any multiple of t. Images (B, C, H, W) are
        clips of one tubelet, of t equal frames.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Any = None,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        *,
        num_frames: int = 16,
        tubelet_size: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if img_size is None or dynamic_img_pad:
            raise ValueError("a video model must have an img_size and no dynamic_img_pad: set_input_size changes it")
        # Its own projection is that of images.
        super().__init__(img_size, patch_size, in_chans, embed_dim, device="meta")
        dd = {"device": device, "dtype": dtype}
        self.tubelet_size = check_integer("tubelet_size", tubelet_size, 1)
        self.proj = TubeletConv(in_chans, embed_dim, self.tubelet_size, self.patch_size, bias=bias, **dd)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim, **dd)
        self.set_input_size(num_frames=num_frames)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        num_frames: int | None = None,
    ) -> None:
        """timm's, for another length of the clips, too; what is None stays."""
        frames = self.num_frames if num_frames is None else num_frames
        rule = f"a positive multiple of tubelet_size={self.tubelet_size}"
        frames = check_integer("num_frames", frames, 1, rule)
        if frames % self.tubelet_size:
            raise ValueError(f"num_frames must be {rule}, got {frames}")
        if patch_size is not None:
            self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
            old = self.proj
            if tuple(old.kernel_size[1:]) != self.patch_size:
                weight = old.weight
                dd = {"device": weight.device, "dtype": weight.dtype}
                size = (old.in_channels, old.out_channels, self.tubelet_size, self.patch_size)
                self.proj = TubeletConv(*size, bias=old.bias is not None, **dd).train(old.training)
                with torch.no_grad():
                    self.proj.weight.copy_(zoom_kernel(weight, self.patch_size))
                self.proj.weight.requires_grad_(weight.requires_grad)
                self.proj.bias = old.bias
        self.img_size, self.grid_size, patches = self._init_img_size(img_size or self.img_size)
        self.num_frames, self.num_steps = frames, frames // self.tubelet_size
        self.num_patches = self.num_steps * patches

    def forward(self, x: Tensor) -> Tensor:
        x = _as_clips(x, self.proj.in_channels, self.tubelet_size, self.img_size)
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


@torch.fx.wrap
def _positions(tokens: Tensor, position: Tensor, times: Tensor | None, prefix: int, steps: int) -> Tensor:
    """Positions of clips with as many times as these tokens (B, N * S, D) have: (1, prefix + N * S, D).

    A function of its own, as tracers must not look into it.
    """
    if times is None:
        own = (position.shape[1] - prefix) // steps
        return zoom_time(position, prefix, steps, tokens.shape[1] // own)
    places = position[:, prefix:]
    times = zoom_time(times, 0, times.shape[1], tokens.shape[1] // places.shape[1])
    return torch.cat([position[:, :prefix], (places.unsqueeze(1) + times.unsqueeze(2)).flatten(1, 2)], 1)


class VideoVMoE(VMoE):
    """V-MoE of clips (B, C, T, H, W): all patches of all frames attend to each other and are routed together.

    Images (B, C, H, W) are clips of one tubelet, of equal frames. Clips of another length T than num_frames get
    positions that are linear between the model's own.

    Takes every argument of `VMoE` and those below; dynamic_img_size must be False.

    Args:
        num_frames: T of the clips, a multiple of tubelet_size.
        tubelet_size: frames of a tubelet.
        pos_embed: "learn", a position for every tubelet; "factorised", the sum of one for its place and one for its
            time; "none".
        group_size: clips per group that is routed on its own; one, as a clip's result then is its own.
    """

    def __init__(
        self,
        *args: Any,
        num_frames: int = 16,
        tubelet_size: int = 2,
        pos_embed: VideoPositionEmbedding = "learn",
        group_size: GroupSize | dict[str, GroupSize] = "image",
        weight_init: WeightInit = "",
        **kwargs: Unpack[VMoEOptions],
    ) -> None:
        if pos_embed not in ("learn", "factorised", "none"):
            raise ValueError(f"pos_embed must be 'learn', 'factorised' or 'none' for a video model, got {pos_embed!r}")
        if kwargs.get("dynamic_img_size"):
            raise ValueError("dynamic_img_size must be False for a video model, got True: set_input_size changes it")

        def embed(**options: Any) -> TubeletEmbed:
            return TubeletEmbed(**options, num_frames=num_frames, tubelet_size=tubelet_size)

        kwargs.setdefault("embed_layer", embed)
        learnt = "none" if pos_embed == "none" else "learn"
        super().__init__(*args, pos_embed=learnt, group_size=group_size, weight_init="skip", **kwargs)
        self.num_frames, self.tubelet_size = self.patch_embed.num_frames, self.patch_embed.tubelet_size
        # Tokens before the patches that have a position.
        self.position_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        self.pos_embed_time = None
        if pos_embed == "factorised":
            places = self.patch_embed.num_patches // self.patch_embed.num_steps
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, : self.position_prefix + places].clone())
            self.pos_embed_time = nn.Parameter(self.pos_embed.new_empty(1, self.patch_embed.num_steps, self.embed_dim))
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """`VMoE`'s; positions of times begin as those of places, the kernel of tubelets as an image's."""
        super().init_weights(mode, needs_reset)
        if self.pos_embed_time is not None:
            nn.init.normal_(self.pos_embed_time, std=0.02)
        if (mode or self.weight_init_mode).startswith("jax"):
            # timm's scheme knows nn.Conv2d alone.
            lecun_normal_(self.patch_embed.proj.weight)
            if self.patch_embed.proj.bias is not None:
                nn.init.zeros_(self.patch_embed.proj.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """`VMoE`'s set, and the positions of times."""
        return super().no_weight_decay() | {"pos_embed_time"}

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Other frames, patches or lengths of clips; learned positions are resized, what is None stays.

        Args:
            img_size: height and width of the frames.
            patch_size: height and width of a patch.
            num_frames: T, a multiple of tubelet_size.
        """
        embed, position = self.patch_embed, self.pos_embed
        old = (embed.num_steps, *embed.grid_size)
        # First the length: on an error nothing has changed. timm's would take all positions for one image's.
        embed.set_input_size(num_frames=num_frames)
        self.pos_embed = None
        super().set_input_size(img_size, patch_size)
        self.num_frames = embed.num_frames
        if num_frames is not None and "_model_args" in self.__dict__:
            self._model_args = {**self._model_args, "num_frames": num_frames}
        new = (embed.num_steps, *embed.grid_size)
        if position is not None and self.pos_embed_time is not None:
            zoomed = zoom_clip_position(position.detach(), self.position_prefix, (1, *old[1:]), (1, *new[1:]))
            times = zoom_time(self.pos_embed_time.detach(), 0, old[0], new[0])
            self.pos_embed_time = nn.Parameter(times, self.pos_embed_time.requires_grad)
        elif position is not None:
            zoomed = zoom_clip_position(position.detach(), self.position_prefix, old, new)
        if position is not None:
            self.pos_embed = nn.Parameter(zoomed, position.requires_grad)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's, with positions of as many times as the clips have."""
        before = []
        if self.cls_token is not None:
            before.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.reg_token is not None:
            before.append(self.reg_token.expand(x.shape[0], -1, -1))
        if self.pos_embed is None:
            return torch.cat(before + [x], 1)
        steps = self.patch_embed.num_steps
        position = _positions(x, self.pos_embed, self.pos_embed_time, self.position_prefix, steps)
        x = torch.cat(before + [x + position], 1) if self.no_embed_class else torch.cat(before + [x], 1) + position
        return self.pos_drop(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **attention: Any,
    ) -> Any:
        """timm's; of clips, "NCHW" gives (B, D, N, rows, columns)."""
        if x.dim() == 4:
            return super().forward_intermediates(
                x,
                indices,
                return_prefix_tokens,
                norm,
                stop_early,
                output_fmt,
                intermediates_only,
                output_dict,
                **attention,
            )
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = vit.feature_take_indices(len(self.blocks), indices)
        grid = (x.shape[2] // self.tubelet_size, *self.patch_embed.grid_size)
        y = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        taken = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            y = vit.checkpoint(block, y) if self.grad_checkpointing and not attention else block(y, **attention)
            if index in take:
                taken.append(self.norm(y) if norm else y)
        first = self.num_prefix_tokens
        prefix = [each[:, :first] for each in taken] if first and return_prefix_tokens else None
        patches = [each[:, first:] for each in taken]
        if output_fmt == "NCHW":
            patches = [each.transpose(1, 2).unflatten(2, grid).contiguous() for each in patches]
        if output_dict:
            found = {"image_intermediates": patches}
            if prefix is not None:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else {**found, "image_features": self.norm(y)}
        result = patches if prefix is None else list(zip(patches, prefix))
        return result if intermediates_only else (self.norm(y), result)


@dataclass
class VideoCfg(PretrainedCfg):
    """What timm knows of a model's data and weights, and the clips: `model.pretrained_cfg` has these keys, too.

    input_size is that of a frame, (C, H, W), for timm's tools.
    """

    num_frames: int = 16
    """T, frames of a clip."""
    frame_stride: int = 4
    """Every how many frames of the video one is taken."""


default_cfgs = generate_default_cfgs(
    {
        "vmoe_video_s16.untrained": VideoCfg(**vmoe_cfg()),
        "vmoe_video_b16.untrained": VideoCfg(**vmoe_cfg()),
        "vmoe_video_l16.untrained": VideoCfg(**vmoe_cfg()),
        "test_vmoe_video.untrained": VideoCfg(**vmoe_cfg(input_size=(3, 64, 64)), num_frames=4, frame_stride=2),
    }
)


def create_video(variant: str, pretrained: bool = False, **kwargs: Any) -> VideoVMoE:
    """timm's way to a video model; clips are as long as its pretrained_cfg says unless num_frames is given."""
    cfg = kwargs.get("pretrained_cfg")
    if isinstance(cfg, dict):
        # timm would make it that of an image model.
        cfg = kwargs["pretrained_cfg"] = VideoCfg(**cfg)
    resolved = resolve_pretrained_cfg(variant, cfg, kwargs.get("pretrained_cfg_overlay"))
    kwargs.setdefault("num_frames", resolved.num_frames)
    return create_vmoe(variant, pretrained, VideoVMoE, **kwargs)


@register_model
def vmoe_video_s16(pretrained: bool = False, **kwargs: Any) -> VideoVMoE:
    """Video V-MoE-S/16, every 2: 8 layers of width 512, clips of 16 frames."""
    args = {"patch_size": 16, "embed_dim": 512, "depth": 8, "num_heads": 8}
    return create_video("vmoe_video_s16", pretrained, **{**args, **kwargs})


@register_model
def vmoe_video_b16(pretrained: bool = False, **kwargs: Any) -> VideoVMoE:
    """Video V-MoE-B/16, every 2: clips of 16 frames."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return create_video("vmoe_video_b16", pretrained, **{**args, **kwargs})


@register_model
def vmoe_video_l16(pretrained: bool = False, **kwargs: Any) -> VideoVMoE:
    """Video V-MoE-L/16, every 2: clips of 16 frames."""
    args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return create_video("vmoe_video_l16", pretrained, **{**args, **kwargs})


@register_model
def test_vmoe_video(pretrained: bool = False, **kwargs: Any) -> VideoVMoE:
    """A tiny video V-MoE for tests: clips of 4 frames of 64 x 64 pixels."""
    args = {"patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0, "num_experts": 4}
    return create_video("test_vmoe_video", pretrained, **{**args, **kwargs})
