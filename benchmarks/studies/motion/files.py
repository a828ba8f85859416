"""Writes the clips of moving characters, for `vmoe train data.name=video data.root=OUT`.

    python -m benchmarks.studies.motion.files FONTS OUT [--characters ABC...] [--clips 1] [--frames 16] [--side 32]

FONTS holds a folder of fonts per split, as `data.name=typefaces` has it; a typeface of one split should be in no other.
A class is a motion of a character, eight motions for each.
"""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from benchmarks.studies.motion.clips import Clips
from benchmarks.studies.motion.draw import MOTIONS

RATE = 8


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


def write_clips(clips: Clips, out: Path) -> None:
    """Writes all clips, for `data.name=video`: OUT/SPLIT/MOTION-CHARACTER/FACE-NUMBER.mkv."""
    for index in range(len(clips)):
        clip, label = clips[index]
        folder = out / clips.split / clips.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        write_clip(folder / f"{clips.name(index)}.mkv", clip)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes all splits that the fonts have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", type=Path, metavar="FONTS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--characters", default="ABEFGHJKLNPQRSTY")
    for name, default in (("--clips", 1), ("--frames", 16), ("--side", 32), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args(arguments)
    sizes = {"clips": options.clips, "frames": options.frames, "side": options.side, "seed": options.seed}
    for split in sorted(path.name for path in options.fonts.iterdir() if path.is_dir()):
        clips = Clips(options.fonts, split, options.characters, **sizes)
        write_clips(clips, options.out)
        count = f"{len(clips):,} clips of {len(options.characters)} characters, {len(MOTIONS)} motions"
        print(f"{options.out / split}: {count}")


if __name__ == "__main__":
    main()
