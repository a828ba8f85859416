"""Clips of a drawn character that moves, turns, grows or is revealed, each of these forwards and backwards.

A motion is the other one of its pair backwards, with the same places, angles, sizes and speeds: every single frame is
as likely in both, so that a model of single frames cannot tell them apart.

Dims: T frames of S x S pixels.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vmoe_torch.data import Typefaces

# In pairs: the second is the first one backwards.
MOTIONS = ("right", "left", "clockwise", "anticlockwise", "grow", "shrink", "reveal", "hide")
RATE = 8
# Of the glyphs that the clips are drawn from.
GLYPH_SIDE = 64


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


def write_clip(path: Path, clip: np.ndarray) -> None:
    """Writes (T, S, S) uint8 as a grey .mkv without any loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "gray"
        for number, array in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(array, format="gray")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def class_name(motion: str, character: str) -> str:
    """What the folder of a class is called: "grow-A", or a number for what is no letter or digit."""
    return f"{motion}-{character if character.isalnum() else f'u{ord(character):04x}'}"


def write_split(
    fonts: Path,
    out: Path,
    split: str,
    characters: Sequence[str],
    *,
    clips: int = 1,
    frames: int = 16,
    side: int = 32,
    seed: int = 0,
    cache: Path | None = None,
) -> int:
    """Writes the clips of a split, for `data.name=video`: OUT/SPLIT/MOTION-CHARACTER/FACE-NUMBER.mkv.

    Args:
        fonts: folder with a folder of fonts per split.
        out: folder of the clips.
        split: of the fonts and of the clips.
        characters: one character each.
        clips: of every face, character and motion.
        frames: of a clip.
        side: of a frame in pixels.
        seed: of all that is drawn.
        cache: of the glyphs, as `Typefaces` has it.

    Returns:
        How many clips there are.
    """
    glyphs = Typefaces(fonts, split, characters, GLYPH_SIDE, cache=cache)
    count = 0
    for index in range(len(glyphs)):
        image, label = glyphs[index]
        face = int(glyphs.face_numbers[index])
        for number, motion in enumerate(MOTIONS):
            folder = out / split / class_name(motion, glyphs.class_names[label])
            folder.mkdir(parents=True, exist_ok=True)
            for clip in range(clips):
                # The same for both of a pair, which differ in nothing but their direction.
                key = (seed, *split.encode(), face, ord(glyphs.class_names[label]), number // 2, clip)
                generator = np.random.default_rng(key)
                drawn = moving_glyph(np.asarray(image), motion, generator, frames, side)
                write_clip(folder / f"{face}-{clip}.mkv", drawn)
                count += 1
    return count
