"""The grid of patches that weights have positions for, and positions resized to another one as the original does."""

import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_torch.layers.choice import description_of

_logger = logging.getLogger(__name__)


def known_grid(state_dict: Mapping[str, Tensor], model: nn.Module) -> tuple[int, int] | None:
    described = description_of(state_dict)
    if described is not None:
        return tuple(described["grid"])
    kernel = state_dict.get("patch_embed.proj.weight")
    size = getattr(model, "pretrained_model_args", {}).get("img_size")
    if size is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size", (0, 0, 0))[1:]
    if not isinstance(kernel, Tensor) or kernel.dim() != 4:
        return None
    return grid_of(size, state_dict)


def grid_of(size: int | tuple[int, int], state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of the patches of images of this size, if they are what a state dict has positions for."""
    height, width = (size, size) if isinstance(size, int) else size
    kernel = state["patch_embed.proj.weight"]
    grid = (int(height) // kernel.shape[-2], int(width) // kernel.shape[-1])
    patches = max(grid[0] * grid[1], 1)
    # A video model may have positions for the patches of several times.
    fits = any(count % patches == 0 if kernel.dim() == 5 else count == patches for count in _patches(state))
    return grid if fits and min(grid) > 0 else None


def square_grid(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The square grid that a state dict has positions for, if it may have one; the original has no other."""
    sides = [math.isqrt(count) for count in _patches(state) if math.isqrt(count) ** 2 == count > 0]
    return (sides[0], sides[0]) if sides else None


def _patches(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many patches there may be positions for: tokens before them have positions, too, or have none."""
    position = state.get("pos_embed")
    if position is None or position.dim() != 3:
        return ()
    before = ("cls_token" in state) + (state["reg_token"].shape[1] if "reg_token" in state else 0)
    return tuple(dict.fromkeys((position.shape[1] - before, position.shape[1])))


def zoom_position(
    source: Tensor, target: Tensor, grid: tuple[int, int], prefix: int, source_grid: tuple[int, int] | None = None
) -> Tensor:
    """Resizes a position embedding as the original does: bilinear, corners on corners.

    A count of positions does not tell their grid: 64 are 8 x 8 or 4 x 16. Where the source's grid is not known, as many
    positions as the target has are taken to be on the target's grid, and others on a square one; the log says so.

    Args:
        source: (1, L, D), a grid with or without prefix tokens before it.
        target: (1, prefix + rows * columns, D), the model's own; lends what the source has no position for.
        grid: rows and columns of the result.
        prefix: tokens before the grid in the target.
        source_grid: rows and columns of the source; None if that is not known.

    Returns:
        (1, prefix + rows * columns, D) in source.dtype.

    Raises:
        ValueError: if the source does not have that grid, or none is given and it has no square one.
    """
    if source.shape == target.shape and source_grid in (None, tuple(grid)):
        return source
    if source.dim() != 3:
        raise ValueError(f"pos_embed must be (1, positions, D), got {tuple(source.shape)}")
    if source_grid is None:
        tokens, source_grid = _square(source.shape[1], prefix)
    else:
        tokens = source.shape[1] - source_grid[0] * source_grid[1]
        if tokens < 0:
            raise ValueError(f"pos_embed must hold a grid of {source_grid}, got {source.shape[1]} positions")
    image = source[:, tokens:].unflatten(1, source_grid).permute(0, 3, 1, 2)
    if tuple(source_grid) != tuple(grid):
        # In float64, as the original's coordinates are; 16-bit types have no bilinear resize of their own everywhere.
        image = F.interpolate(image.double(), size=tuple(grid), mode="bilinear", align_corners=True).to(source.dtype)
    own = target[:, :prefix].to(source)
    first = torch.cat([source[:, : min(tokens, prefix)], own[:, tokens:]], 1)
    return torch.cat([first, image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _square(positions: int, prefix: int) -> tuple[int, tuple[int, int]]:
    """Tokens before a square grid, and the grid."""
    for tokens in dict.fromkeys((prefix, 0, 1)):
        side = math.isqrt(max(positions - tokens, 0))
        if side and side * side == positions - tokens:
            _logger.warning("%d positions are taken for a grid of %d x %d patches", positions, side, side)
            return tokens, (side, side)
    raise ValueError(f"pos_embed must hold a square grid to be resized, got {positions} positions")
