"""Distortions of drawn characters: what paper, pen and camera do to a glyph, and what must not change what it says."""

import random

import numpy as np
from PIL import Image, ImageChops, ImageFilter


class Distort:
    """A random affine map, thinner or thicker strokes, blur, ink and paper, noise, of a grey PIL image ("L" or "RGB").

    All draws are from Python's and NumPy's global generators, which the loader seeds per image.

    Args:
        size: (height, width) of the result; the picture is resampled once, by the affine map itself.
        degrees: largest rotation.
        shear: largest horizontal shear, as a tangent.
        scale: smallest and largest scale, of both axes on their own.
        shift: largest shift, as a share of the size.
        stroke: probability of thinner or thicker strokes, mixed in by a random share.
        blur: largest radius in pixels of the result.
        contrast: smallest ink, as a share of the full range.
        noise: largest standard deviation, of 255.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        size: tuple[int, int],
        degrees: float = 12.0,
        shear: float = 0.2,
        scale: tuple[float, float] = (0.75, 1.1),
        shift: float = 0.08,
        stroke: float = 0.5,
        blur: float = 0.8,
        contrast: float = 0.5,
        noise: float = 12.0,
    ):
        for name, value, most in (
            ("degrees", degrees, 180),
            ("shear", shear, 1),
            ("shift", shift, 1),
            ("stroke", stroke, 1),
            ("blur", blur, 16),
            ("contrast", contrast, 1),
            ("noise", noise, 255),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be in 0..{most}, got {value}")
        if not 0 < scale[0] <= scale[1] <= 4:
            raise ValueError(f"scale must be two numbers in (0, 4], the smaller one first, got {scale}")
        self.size = size
        self.degrees, self.shear, self.scale, self.shift = degrees, shear, scale, shift
        self.stroke, self.blur, self.contrast, self.noise = stroke, blur, contrast, noise

    @classmethod
    def of_strength(cls, size: tuple[int, int], strength: float) -> "Distort":
        """All defaults at so many times their distance from changing nothing.

        Args:
            size: (height, width) of the result.
            strength: in 0..2; 1 is `Distort(size)`.

        Raises:
            ValueError: if the strength is out of its range.
        """
        if not 0 <= strength <= 2:
            raise ValueError(f"strength must be in 0..2, got {strength}")
        plain = cls(size)
        return cls(
            size,
            degrees=strength * plain.degrees,
            shear=strength * plain.shear,
            scale=tuple(1 + strength * (scale - 1) for scale in plain.scale),
            shift=strength * plain.shift,
            stroke=strength * plain.stroke,
            blur=strength * plain.blur,
            contrast=1 + strength * (plain.contrast - 1),
            noise=strength * plain.noise,
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        image = self._blurred(self._moved(self._stroked(image)))
        ink = np.asarray(image, np.float32)
        paper = random.uniform(0, 1 - self.contrast) * 255
        share = random.uniform(self.contrast, 1)
        ink = paper + ink * share * (1 - paper / 255)
        noise = np.random.standard_normal(ink.shape[:2]).astype(np.float32) * random.uniform(0, self.noise)
        # Grey in colour, too.
        ink += noise if ink.ndim == 2 else noise[..., None]
        return Image.fromarray(np.clip(ink, 0, 255).astype(np.uint8))

    def _stroked(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.stroke:
            return image
        # Of three by three pixels: of the ink's neighbours the darkest is kept, or the brightest.
        choose = ImageChops.lighter if random.random() < 0.5 else ImageChops.darker
        across = choose(ImageChops.offset(image, 1, 0), image)
        other = choose(ImageChops.offset(across, 0, 1), across)
        return Image.blend(image, other, random.random())

    def _moved(self, image: Image.Image) -> Image.Image:
        """The affine map, from the result's pixels to the picture's."""
        height, width = self.size
        angle = np.deg2rad(random.uniform(-self.degrees, self.degrees))
        shear = random.uniform(-self.shear, self.shear)
        scale = np.diag([1 / random.uniform(*self.scale) for _ in range(2)])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        # Between squares of side 1, then in pixels of both.
        linear = turn @ np.array([[1, shear], [0, 1]]) @ scale
        shift = np.array([random.uniform(-self.shift, self.shift) for _ in range(2)])
        source, target = np.array(image.size, float), np.array([width, height], float)
        matrix = np.diag(source) @ linear @ np.diag(1 / target)
        offset = source * (0.5 + shift) - matrix @ (target / 2)
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        return image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)

    def _blurred(self, image: Image.Image) -> Image.Image:
        radius = random.uniform(0, self.blur)
        return image if radius < 0.1 else image.filter(ImageFilter.GaussianBlur(radius))
