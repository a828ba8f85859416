"""An image model's patch kernel and positions, made those of a video model (arXiv 2103.15691, section 3.4).

Dims: D width, C channels, t frames of a tubelet, N tubelets of a clip at one place, S patches of a frame.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from vmoe_torch.weights.grid import zoom_position

InflationMode = Literal["central", "average"]
MODES = ("central", "average")


def inflated_kernel(kernel: Tensor, tubelet_size: int, mode: InflationMode = "central") -> Tensor:
    """The kernel of a tubelet: a clip of one repeated frame gives what the image gives.

    Args:
        kernel: (D, C, height, width).
        tubelet_size: t.
        mode: "central" puts it at frame t // 2 and zeros elsewhere, "average" puts kernel / t at every frame.

    Returns:
        (D, C, t, height, width) in kernel.dtype.

    Raises:
        ValueError: if there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if mode == "average":
        return kernel.unsqueeze(2).repeat(1, 1, tubelet_size, 1, 1) / tubelet_size
    inflated = kernel.new_zeros(*kernel.shape[:2], tubelet_size, *kernel.shape[2:])
    inflated[:, :, tubelet_size // 2] = kernel
    return inflated


def zoom_kernel(kernel: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The kernel for other patches, resized as timm does, frame by frame: (D, C, t, height, width) as given."""
    if tuple(kernel.shape[3:]) == tuple(patch_size):
        return kernel
    return resample_patch_embed(kernel.flatten(1, 2), list(patch_size)).unflatten(1, kernel.shape[1:3])


def repeated_positions(position: Tensor, prefix: int, steps: int) -> Tensor:
    """An image's positions for every time.

    Args:
        position: (1, prefix + S, D).
        prefix: tokens before the patches.
        steps: N.

    Returns:
        (1, prefix + N * S, D), one time after another.
    """
    return torch.cat([position[:, :prefix], position[:, prefix:].repeat(1, steps, 1)], 1)


def zoom_time(position: Tensor, prefix: int, steps: int, new_steps: int) -> Tensor:
    """Positions of a clip of another length, linear in time, ends on ends; of one time alone, the first.

    Args:
        position: (1, prefix + N * S, D), one time after another.
        prefix: tokens before the patches.
        steps: N.
        new_steps: that of the result.

    Returns:
        (1, prefix + new_steps * S, D) in position.dtype.
    """
    if steps == new_steps:
        return position
    # (1, S * D, N): in float64, so that equal positions stay as they are.
    times = position[:, prefix:].unflatten(1, (steps, -1)).flatten(2).transpose(1, 2).double()
    times = F.interpolate(times, size=new_steps, mode="linear", align_corners=True).to(position.dtype)
    patches = times.transpose(1, 2).reshape(1, -1, position.shape[2])
    return torch.cat([position[:, :prefix], patches], 1)


def zoom_clip_position(position: Tensor, prefix: int, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """Positions of clips of another size: each time as an image's (`zoom_position`), then all over time.

    Args:
        position: (1, prefix + N * rows * columns, D).
        prefix: tokens before the patches.
        old: (N, rows, columns) that it is of.
        new: (N, rows, columns) of the result.

    Returns:
        (1, prefix + product of new, D) in position.dtype.
    """
    if tuple(old[1:]) != tuple(new[1:]):
        first, times = position[:, :prefix], position[:, prefix:].unflatten(1, (old[0], -1)).unbind(1)
        target = position.new_empty(1, new[1] * new[2], position.shape[2])
        position = torch.cat([first, *(zoom_position(time, target, new[1:], 0, old[1:]) for time in times)], 1)
    return zoom_time(position, prefix, old[0], new[0])


def for_video(state: Mapping[str, Tensor], model: nn.Module, grid: tuple[int, int] | None) -> dict[str, Tensor]:
    """A state dict as a video model's, of clips of its own length and size; an image model's is inflated.

    The kernel goes to the central frame. Positions are repeated over time where the model has one for every tubelet;
    where it has one for every place and one for every time, those of times begin at 0.

    Args:
        state: names as ours, of a video or an image model.
        model: a `VideoVMoE`.
        grid: rows and columns that the state has positions for; None if that is not known, and then a square.

    Raises:
        ValueError: if the tubelets have another length, or the positions are of no such grid.
    """
    state, own = dict(state), model.state_dict()
    embed, prefix = model.patch_embed, 0 if model.no_embed_class else model.num_prefix_tokens
    kernel = state.get("patch_embed.proj.weight")
    is_image = kernel is not None and kernel.dim() == 4
    if is_image:
        kernel = inflated_kernel(kernel, embed.tubelet_size)
    if kernel is not None:
        if kernel.shape[2] != embed.tubelet_size:
            raise ValueError(f"tubelet_size must be {kernel.shape[2]} for these weights, got {embed.tubelet_size}")
        state["patch_embed.proj.weight"] = zoom_kernel(kernel, embed.patch_size)
    position, times = state.get("pos_embed"), state.get("pos_embed_time")
    if position is None or "pos_embed" not in own or position.dim() != 3:
        return state
    steps, size = embed.num_steps, embed.grid_size
    if is_image:
        target = own["pos_embed"][:, : prefix + size[0] * size[1]]
        position = zoom_position(position, target, size, prefix, grid)
        if "pos_embed_time" in own:
            times = torch.zeros_like(own["pos_embed_time"])
        else:
            position = repeated_positions(position, prefix, steps)
    elif times is not None:
        old = (1, *(grid or size))
        _check_positions(position, prefix, old)
        position = zoom_clip_position(position, prefix, old, (1, *size))
        times = zoom_time(times, 0, times.shape[1], steps)
    elif grid is not None or position.shape != own["pos_embed"].shape:
        if grid is None:
            shapes = [tuple(each.shape) for each in (own["pos_embed"], position)]
            raise ValueError(f"pos_embed must be {shapes[0]}, or the weights tell its grid, got {shapes[1]}")
        old = ((position.shape[1] - prefix) // (grid[0] * grid[1]), *grid)
        _check_positions(position, prefix, old)
        position = zoom_clip_position(position, prefix, old, (steps, *size))
    state["pos_embed"] = position
    if times is not None:
        state["pos_embed_time"] = times
    return state


def _check_positions(position: Tensor, prefix: int, grid: tuple[int, int, int]) -> None:
    if position.shape[1] != prefix + grid[0] * grid[1] * grid[2] or grid[0] < 1:
        got = position.shape[1]
        raise ValueError(f"pos_embed must hold whole grids of {tuple(grid[1:])} after {prefix} tokens, got {got}")
