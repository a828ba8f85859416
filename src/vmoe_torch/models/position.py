"""Position embeddings as in the original: fixed sine-cosine ones (after MoCo v3, arXiv 2104.02057)."""

import torch
from torch import Tensor

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
