"""Position embeddings as in the original: fixed sine-cosine ones (after MoCo v3, arXiv 2104.02057), and resizing."""

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_logger = logging.getLogger(__name__)
# The original's default.
TEMPERATURE = 10_000.0


def sincos2d(height: int, width: int, dim: int, temperature: float = TEMPERATURE) -> Tensor:
    """The original's "sincos2d": position embedding of a grid of patches, in the order sin x, cos x, sin y, cos y.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: D, a multiple of 4 and at least 8.
        temperature: the longest wave length over 2 pi.

    Returns:
        (1, height * width, D) float32.

    Raises:
        ValueError: if the dim does not divide.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"embed_dim must be a multiple of 4 and at least 8 for sincos2d, got {dim}")
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4 - 1))
    angle_x, angle_y = x.flatten().unsqueeze(1) * omega, y.flatten().unsqueeze(1) * omega
    return torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], 1).unsqueeze(0).float()


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
