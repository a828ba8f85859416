"""What the commands that read images have in common: broken ones, and saying which images there were."""

import argparse
import sys

from torch.utils.data import DataLoader, Dataset

from vmoe_torch.commands.sources import Images, Source
from vmoe_torch.data import evaluation_loader
from vmoe_torch.data.loader import Batches

# What errors call it, those of the library, too.
MAX_BROKEN = "max_broken"


def batches(source: Source, images: Dataset, options: argparse.Namespace) -> DataLoader | Batches:
    """Batches (images, labels) for a model, without the broken images, which are named on stderr."""
    pin = options.device.startswith("cuda")
    loader = evaluation_loader(
        images,
        source.transform,
        options.batch_size,
        options.workers,
        pin,
        max_broken=options.max_broken,
        option=MAX_BROKEN,
    )
    loader.warn = warn
    return loader


def warn(message: str) -> None:
    """A line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def tell(name: str, images: Images) -> None:
    """Which images there were, on stderr: what a command prints on stdout is for programs, too."""
    print(f"{name}: {images.described()}", file=sys.stderr)
