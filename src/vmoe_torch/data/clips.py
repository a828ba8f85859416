"""Clips of videos: which frames, at random or as evenly spaced views, and one image transform for all frames alike.

Dims: V views of a video, T frames of a clip.
"""

import math
import numbers
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.functional import crop

from vmoe_torch.data.video import Video


@dataclass(frozen=True)
class ClipTiming:
    """How many frames a clip has, and how far apart."""

    frames: int
    """T, at least 1."""
    frame_stride: float = 1.0
    """Every so many-th frame of the video is one of the clip, at the video's mean rate; above 0."""
    fps: float | None = None
    """Frames a second instead, whatever the video's rate; above 0."""

    def __post_init__(self) -> None:
        if not isinstance(self.frames, numbers.Integral):
            raise ValueError(f"frames must be a whole number, got {self.frames!r}")
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        for name in ("frame_stride", "fps"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, numbers.Real) and 0 < value < math.inf):
                raise ValueError(f"{name} must be above 0, got {value!r}")

    @classmethod
    def of(
        cls, model: nn.Module, frames: int | None = None, frame_stride: float | None = None, fps: float | None = None
    ) -> "ClipTiming":
        """The clips that a model takes; what is given counts, and the model says the rest.

        Args:
            model: with `num_frames`, unless `frames` is given; with `tubelet_size`, frames of a tubelet, if it has
                tubelets; `pretrained_cfg` may have a `frame_stride`.
            frames: T.
            frame_stride: as the attribute.
            fps: as the attribute.

        Raises:
            ValueError: if the model takes no such clips.
        """
        own = getattr(model, "num_frames", None)
        if own is None and frames is None:
            raise ValueError(f"model must be one of videos, or frames given, got {type(model).__name__}")
        frames = own if frames is None else frames
        tubelet = frames_of_a_tubelet(model)
        if frames % tubelet:
            raise ValueError(f"frames must be a multiple of the model's tubelets of {tubelet} frames, got {frames}")
        if frame_stride is None:
            frame_stride = (getattr(model, "pretrained_cfg", None) or {}).get("frame_stride") or 1.0
        return cls(frames, float(frame_stride), fps)

    def starts(self, seconds: float, rate: float) -> int:
        """The frames of a video that a clip may begin with, at least 1, whatever the video's length."""
        length = int((self.frames - 1) * self._step(rate) * rate + 1e-6) + 1
        return max(round(seconds * rate) - length, 0) + 1

    def times(self, start: int, seconds: float, rate: float) -> list[float]:
        """When the frames of a clip are shown that begins with some frame, each in the middle of a frame's time.

        Args:
            start: below `starts`.
            seconds: of the video.
            rate: of the video in frames a second.
        """
        # A shorter video stands still at its end.
        last = max(seconds - 0.5 / rate, 0.0)
        return [min((start + 0.5) / rate + i * self._step(rate), last) for i in range(self.frames)]

    def _step(self, rate: float) -> float:
        return self.frame_stride / rate if self.fps is None else 1 / self.fps


class ClipTransform:
    """A video as a clip, or as several: frames chosen, then a transform of images, which treats all frames alike.

    The transform is run on every frame with the same state of Python's, NumPy's and torch's global generators, so that
    a crop, a mirror, a colour, a policy of timm's or an erased rectangle is the same in all of them; a clip of one
    repeated frame is that image's tensor, repeated. timm's transforms for images are used as they are.

    Args:
        image: PIL image -> (C, H, W), may be random.
        timing: of the clips.
        clips: how many, evenly spaced from the first frame to the last, one alone in the middle; None takes one at
            random, by Python's global generator, which the loader seeds for every item.
        crops: of every clip, evenly spaced along the longer side of its frames; needs a center crop in `image`.

    Attributes:
        num_views: V, clips times crops.

    Raises:
        ValueError: if a number is below 1, or crops are wanted of a transform without a center crop.
    """

    def __init__(
        self, image: Callable[[Image.Image], Tensor], timing: ClipTiming, clips: int | None = 1, crops: int = 1
    ):
        for name, value in (("clips", clips), ("crops", crops)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.image = image
        self.timing = timing
        self.clips = clips
        self.crops = crops
        self.num_views = (clips or 1) * crops
        self._crops = [image] if crops == 1 else _cropping(image, crops)

    def views(self, clips: int, crops: int) -> "ClipTransform":
        """The same transform of several views of each video."""
        return ClipTransform(self.image, self.timing, clips, crops)

    def __call__(self, video: Video) -> Tensor:
        """The clip (C, T, H, W) of a video, or its views (V, C, T, H, W), crop by crop of the first clip first.

        Raises:
            BrokenImageError: if the video cannot be read.
        """
        frames = video.read(self._times)
        size = self.timing.frames
        clips = [frames[start : start + size] for start in range(0, len(frames), size)]
        views = [alike(transform, clip) for clip in clips for transform in self._crops]
        return views[0] if self.num_views == 1 else torch.stack(views)

    def _times(self, seconds: float, rate: float) -> list[float]:
        last = self.timing.starts(seconds, rate) - 1
        if self.clips is None:
            starts = [random.randint(0, last)]
        elif self.clips == 1:
            starts = [last // 2]
        else:
            starts = [round(last * number / (self.clips - 1)) for number in range(self.clips)]
        return [time for start in starts for time in self.timing.times(start, seconds, rate)]


def alike(transform: Callable[[Image.Image], Tensor], frames: Sequence[Image.Image]) -> Tensor:
    """A transform of images on every frame, with the same random draws.

    Args:
        transform: PIL image -> (C, H, W); draws from Python's, NumPy's and torch's global generators.
        frames: T images.

    Returns:
        (C, T, H, W).
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    made: list[Tensor] = []
    for frame in frames:
        if made:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        made.append(transform(frame))
    return torch.stack(made, 1)


def frames_of_a_tubelet(model: nn.Module) -> int:
    """Frames that make one layer of a model's tokens; 1 for a model without tubelets."""
    size: Any = getattr(model, "tubelet_size", 1)
    return int(size[0] if isinstance(size, tuple | list) else size)


class _CropAt:
    """A center crop's size, its place along the longer side of the image given as a share of what is left there."""

    def __init__(self, size: tuple[int, int], share: float):
        self.size = size
        self.share = share

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        free = image.height - height, image.width - width
        wide = free[1] >= free[0]
        top, left = (round(room * (self.share if wide == is_width else 0.5)) for is_width, room in enumerate(free))
        return crop(image, top, left, height, width)


def _cropping(image: Callable[[Image.Image], Tensor], crops: int) -> list[Callable[[Image.Image], Tensor]]:
    """The transform once for every crop, its center crop moved."""
    parts = getattr(image, "transforms", [])
    places = [place for place, part in enumerate(parts) if isinstance(part, CenterCrop)]
    # Resized to height and width ("squash"), a frame has no longer side.
    squashed = any(isinstance(part, Resize) and not isinstance(part.size, int) for part in parts)
    if len(places) != 1 or squashed:
        raise ValueError(f"crops must be 1 for a transform without a center crop (data.crop_mode=center), got {crops}")
    size = parts[places[0]].size
    return [
        Compose([*parts[: places[0]], _CropAt(tuple(size), number / (crops - 1)), *parts[places[0] + 1 :]])
        for number in range(crops)
    ]
