"""Clips of a drawn character that moves, turns, grows or is revealed, each of these forwards and backwards.

A motion is the other one of its pair backwards, with the same places, angles, sizes and speeds: every single frame is
as likely in both, so that a model of single frames cannot tell them apart.

Dims: T frames of S x S pixels.
"""

import numpy as np
from PIL import Image

# In pairs: the second is the first one backwards.
MOTIONS = ("right", "left", "clockwise", "anticlockwise", "grow", "shrink", "reveal", "hide")


def moving_glyph(
    glyph: np.ndarray, motion: str, generator: np.random.Generator, frames: int = 16, side: int = 32
) -> np.ndarray:
    """A clip of a glyph.

    Args:
        glyph: square, uint8, ink white on black.
        motion: of `MOTIONS`.
        generator: draws size, place, angle and speed.
        frames: T, at least 2.
        side: S.

    Returns:
        (T, S, S) uint8.

    Raises:
        ValueError: if there is no such motion, or fewer than 2 frames.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    pair, backwards = divmod(MOTIONS.index(motion), 2)
    size, x, y, angle, seen = np.ones((5, frames))
    size *= generator.uniform(0.5, 0.75)
    x *= generator.uniform(-0.08, 0.08)
    y *= generator.uniform(-0.08, 0.08)
    angle *= generator.uniform(-15, 15)
    way = np.linspace(-0.5, 0.5, frames) * generator.uniform(0.6, 1.0)
    if pair == 0:
        x = x + 0.5 * way
    elif pair == 1:
        angle = angle + 150 * way
    elif pair == 2:
        size = size * 2.0**way
    else:
        seen = 0.5 + way
    clip = np.stack([_drawn(glyph, *values, side) for values in zip(size, x, y, angle, seen)])
    return clip[::-1].copy() if backwards else clip


def _drawn(glyph: np.ndarray, size: float, x: float, y: float, angle: float, seen: float, side: int) -> np.ndarray:
    """A frame: size and place as shares of its side, degrees clockwise, the share of the glyph that is seen."""
    shown = glyph.copy()
    shown[:, round(seen * glyph.shape[1]) :] = 0
    turn, scale = np.deg2rad(angle), glyph.shape[0] / (size * side)
    # From the frame's pixels to the glyph's.
    matrix = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    centre = side * np.array([0.5 + x, 0.5 + y])
    offset = np.array(glyph.shape[::-1]) / 2 - matrix @ centre
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    picture = Image.fromarray(shown).transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(picture)
