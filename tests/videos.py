"""Video files made by PyAV: frame i is of one grey that says its number."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 12
SIZE = (32, 48)
# By ending: a codec that PyAV always has, and its pixels.
CODECS = {
    ".mp4": ("mpeg4", "yuv420p"),
    ".m4v": ("mpeg4", "yuv420p"),
    ".mov": ("mpeg4", "yuv420p"),
    ".avi": ("mpeg4", "yuv420p"),
    ".webm": ("libvpx", "yuv420p"),
    ".mkv": ("ffv1", "gray"),
    ".gif": ("gif", "gray"),
}


def grey(number: int) -> int:
    """The grey of a frame, which its number decides up to the 20th."""
    return STEP + STEP * (number % 20)


def number_of(values) -> int:
    """The number modulo 20 of the frame whose grey these values are, in 0..255."""
    return round(float(np.mean(np.asarray(values))) / STEP - 1)


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 12,
    rate: int = 8,
    times: Sequence[float] | None = None,
    gop: int = 12,
    size: tuple[int, int] = SIZE,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a file whose format its ending says.

    Args:
        path: of the file, in a folder that is made.
        frames: how many grey ones, or (H, W) or (H, W, 3) uint8 each.
        rate: frames a second.
        times: when each begins, in seconds.
        gop: frames from one key frame to the next.
        size: height and width of the grey ones.
        options: of the container, as FFmpeg names them.
    """
    codec, pixels = CODECS[path.suffix]
    if isinstance(frames, int):
        frames = [np.full(size, grey(number), np.uint8) for number in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.bit_rate = 4_000_000
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="gray" if array.ndim == 2 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with sound alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path: Path, quarters: int = 1) -> Path:
    """Makes an .mp4 one that players turn by so many quarters, clockwise; by one, it was filmed upright."""
    data = bytearray(path.read_bytes())
    # The matrix ends the track's header, before its width and height.
    begin = data.index(b"tkhd") - 4
    (length,) = struct.unpack(">I", data[begin : begin + 4])
    cos, sin = (0x10000 * value for value in ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters % 4])
    struct.pack_into(">9i", data, begin + length - 44, cos, sin, 0, -sin, cos, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    return path
