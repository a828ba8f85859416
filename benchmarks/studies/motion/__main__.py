"""Writes the clips of moving characters, for `vmoe train data.name=video data.root=OUT`.

    python -m benchmarks.studies.motion FONTS OUT [--characters ABC...] [--clips 1] [--frames 16] [--side 32] [--seed 0]

FONTS holds a folder of fonts per split, as `data.name=typefaces` has it; a typeface of one split should be in no other.
A class is a motion of a character, eight motions for each.
"""

import argparse
from pathlib import Path

from benchmarks.studies.motion.draw import MOTIONS, write_split


def main(arguments: list[str] | None = None) -> None:
    """Writes all splits that the fonts have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", type=Path, metavar="FONTS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--characters", default="ABEFGHJKLNPQRSTY")
    for name, default in (("--clips", 1), ("--frames", 16), ("--side", 32), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args(arguments)
    for split in sorted(path.name for path in options.fonts.iterdir() if path.is_dir()):
        count = write_split(
            options.fonts,
            options.out,
            split,
            options.characters,
            clips=options.clips,
            frames=options.frames,
            side=options.side,
            seed=options.seed,
        )
        print(f"{options.out / split}: {count:,} clips of {len(options.characters)} characters, {len(MOTIONS)} motions")


if __name__ == "__main__":
    main()
