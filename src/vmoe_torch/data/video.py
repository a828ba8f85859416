"""Video files read by PyAV: the frames that a player would show at given times, whatever the file's frame rate.

PyAV brings its own FFmpeg; it is the extra `video` and is imported when the first file is read. Decoding begins at the
key frame before the first time and ends at the last one, so neither time nor memory depends on the length of the file.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vmoe_torch.data.image import BrokenImageError
from vmoe_torch.data.names import shown
from vmoe_torch.extras import how_to_install

if TYPE_CHECKING:
    import av

VIDEO = "video"
SUFFIXES = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))
# Of a file that does not tell any.
_USUAL_RATE = 25.0
# A frame so many seconds on is looked for anew, rather than by decoding all up to it.
_FAR = 2.0
# Seconds that a file is looked into further ahead, where its index has led behind the frame that was wanted.
_BACK = (0.0, 10.0, math.inf)
# How Matroska says how long a stream is; its container tells the longest stream alone.
_LENGTH = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True)
class Video:
    """A video file, which is opened whenever frames of it are read."""

    path: str
    """The file."""
    mode: str = "RGB"
    """PIL mode of the frames, "RGB" or "L"."""

    def read(self, choose: Callable[[float, float], Sequence[float]]) -> list[Image.Image]:
        """Frames at times that depend on how long the video is.

        Args:
            choose: of the video's seconds and its mean frames a second makes times in seconds from its beginning.

        Returns:
            The frame that is shown at each time, upright, all of the first one's size; the last frame for later times.

        Raises:
            BrokenImageError: if the file is missing, is no video, or is damaged where frames are read; names it.
            ValueError: if PyAV is not installed.
        """
        av = import_av()
        try:
            with av.open(self.path) as container:
                stream = OpenVideo(container)
                return stream.frames_at(choose(stream.seconds, stream.rate), self.mode)
        except FileNotFoundError:
            raise BrokenImageError(f"video {shown(self.path)} does not exist") from None
        # Others than FFmpeg's come from packets that make no sense.
        except (av.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BrokenImageError(f"video {shown(self.path)} cannot be read: {shown(reason)}") from None


def import_av():
    """The module `av`.

    Raises:
        ValueError: telling what to install, if it is missing.
    """
    try:
        import av
    except ImportError:
        raise ValueError(f"videos are read by PyAV: {how_to_install('av')}") from None
    return av


class OpenVideo:
    """The first video stream of an open container that is no still picture, as the cover of a song is.

    Attributes:
        rate: frames a second, on average.
        seconds: how long it is.
        decoded: frames that were decoded so far.

    Raises:
        ValueError: if there is no such stream.
    """

    def __init__(self, container: "av.container.InputContainer"):
        self.container = container
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise ValueError("it holds no video stream")
        self.stream = streams[0]
        # Processes that load are what runs at once; each with threads of its own would be too many.
        self.stream.codec_context.thread_count = 1
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or _USUAL_RATE)
        self.decoded = 0
        self._start = self.stream.start_time or 0
        self._base = float(self.stream.time_base)
        self.seconds, self._sure = self._length()

    def _length(self) -> tuple[float, bool]:
        """Seconds, and whether they are this stream's for sure, or perhaps another's."""
        stream, container = self.stream, self.container
        if stream.duration:
            return stream.duration * self._base, True
        if found := _LENGTH.fullmatch(stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(float, found.groups())
            return 3600 * hours + 60 * minutes + seconds - self._start * self._base, True
        if container.duration:
            return container.duration / 1e6, len(container.streams) == 1
        # A recording that was never finished: reading its packets decodes nothing.
        ends = [
            (packet.pts - self._start + (packet.duration or 0)) * self._base
            for packet in container.demux(stream)
            if packet.pts is not None
        ]
        container.seek(0)
        return max(ends, default=0.0), True

    def frames_at(self, times: Sequence[float], mode: str = "RGB") -> list[Image.Image]:
        """The frames that are shown at some times, each of which is decoded once.

        Args:
            times: in seconds from the beginning, in any order.
            mode: PIL mode, "RGB" or "L".

        Raises:
            ValueError: if there is no frame, or the file ends before it should.
            av.FFmpegError: if it is damaged.
        """
        pictures: dict[float, Image.Image] = {}
        frames, now, coming, size = None, None, None, None
        for time in sorted(set(times)):
            if frames is None or (coming is not None and time - coming[0] > _FAR):
                frames = self._from(time)
                now, coming = None, next(frames, None)
            while coming is not None and (now is None or coming[0] <= time):
                now, coming = coming, next(frames, None)
            if now is None:
                raise ValueError("it holds no frame")
            begin, frame = now
            if frame.is_corrupt:
                raise ValueError(f"its frame at {begin:.2f} s is damaged")
            if coming is None and self._is_cut(frame, begin, time):
                raise ValueError(f"it ends after {begin:.2f} of {self.seconds:.2f} s")
            size = size or (frame.width, frame.height)
            pictures[time] = _picture(frame, mode, size)
        return [pictures[time] for time in times]

    def _from(self, time: float) -> Iterator[tuple[float, "av.VideoFrame"]]:
        """Frames in order and when they begin, the first not after this time if there is such a one."""
        if time <= _FAR and not self.decoded:
            return self._decoded()
        for back in _BACK:
            earlier = max(time - back, 0.0)
            try:
                self.container.seek(self._start + int(earlier / self._base), stream=self.stream)
                frames = self._decoded()
                first = next(frames, None)
            except import_av().FFmpegError:
                if earlier == 0:
                    raise
                continue
            if earlier == 0 or (first is not None and first[0] <= time):
                break
        return chain([] if first is None else [first], frames)

    def _decoded(self) -> Iterator[tuple[float, "av.VideoFrame"]]:
        begin = -1 / self.rate
        for frame in self.container.decode(self.stream):
            self.decoded += 1
            # Some old files give some frames no time.
            begin = begin + 1 / self.rate if frame.time is None else frame.time - self._start * self._base
            yield begin, frame

    def _is_cut(self, last: "av.VideoFrame", begin: float, time: float) -> bool:
        """Whether the file tells of later frames than its last one, of which one was wanted."""
        shown_for = max(last.duration * self._base, 1 / self.rate) + 1 / self.rate
        return self._sure and min(time, self.seconds) > begin + shown_for


def _picture(frame: "av.VideoFrame", mode: str, size: tuple[int, int]) -> Image.Image:
    """A frame upright, of a width and height before it is turned."""
    pixels = frame.reformat(*size, format="rgb24" if mode == "RGB" else "gray").to_ndarray()
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))
