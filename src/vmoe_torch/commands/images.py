"""Labelled images to use a model on: opened, read without the broken ones, and told of."""

import argparse
import sys
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from vmoe_torch.commands.sources import Source
from vmoe_torch.data import (
    ClipTransform,
    ImageFolder,
    LabelledImages,
    TarShards,
    Typefaces,
    evaluation_loader,
    open_data,
)
from vmoe_torch.data.factory import FOLDER, named_data
from vmoe_torch.data.glyphs import has_fonts
from vmoe_torch.data.loader import Batches
from vmoe_torch.data.names import shown
from vmoe_torch.data.typefaces import TYPEFACES, are_characters
from vmoe_torch.data.video import VIDEO

# What errors call it, those of the library, too.
MAX_BROKEN = "max_broken"


def open_images(
    source: Source,
    data: str | Path,
    split: str | None = None,
    *,
    own_labels: bool = False,
    class_names: tuple[str, ...] | None = None,
) -> LabelledImages:
    """Opens images for a model, labelled as the model labels.

    Where both sides have names of classes, labels follow the model's; the images need not show all of its classes.

    Args:
        source: the model.
        data: a folder, "fashion_mnist", or a name of `vmoe_torch.data.open_data` and its folder, as
            "torch/cifar10=FOLDER". Of fonts ("typefaces=FOLDER", or FOLDER for a model that learned from fonts) the
            characters that the model knows. A folder is of videos for a model that takes them.
        split: as `open_data` has it; None is one to measure on.
        own_labels: whether to number the classes as the data set does, whatever those of the model.
        class_names: to number the classes so, whatever those of the model.

    Raises:
        ValueError: if there is no such data or split, or its classes are not the model's.
    """
    text = str(data)
    name, root = named_data(text)
    config = None if source.config is None else source.config.data
    drawn = config is not None and config.name == TYPEFACES
    if name == FOLDER and drawn and has_fonts(root):
        name = TYPEFACES
    # As the model has seen images in training; the original does not turn them.
    arguments = {"mode": source.mode, "exif": config is not None and config.exif}
    takes_videos = isinstance(source.transform, ClipTransform)
    if name == FOLDER and takes_videos:
        name = VIDEO
    if (name == VIDEO) != takes_videos:
        kind = "videos" if takes_videos else "images"
        raise ValueError(f"data must be {kind}, as the model takes them, got {shown(text)}")
    if name == TYPEFACES:
        known = class_names or (None if own_labels else source.class_names)
        arguments["class_names"] = known if known is not None and are_characters(known) else None
        if drawn and "side" in config.kwargs:
            arguments["side"] = config.kwargs["side"]
    dataset = open_data(name, root, split, **arguments)
    images = LabelledImages(dataset, text, source.mode, _title(dataset, text))
    if class_names is not None and images.class_names is not None:
        images.follow(class_names)
    if own_labels or class_names is not None:
        return images
    names, own = images.class_names, source.class_names
    # Data sets of timm's number their classes in an order that is known, whatever they call them.
    if names is not None and own is not None and (set(names) <= set(own) or "/" not in name):
        images.follow(own)
        return images
    count = getattr(source.model, "num_classes", None)
    if names is not None and count is not None and len(names) != count:
        raise ValueError(f"{shown(text)} must have as many classes as the model, {count}, got {len(names)}")
    images.class_names = own or names
    return images


def _title(dataset: Dataset, text: str) -> str:
    """What a user called the data, and which part of it is open."""
    if isinstance(dataset, ImageFolder):
        return ", ".join(str(dataset.root / part) for part in dataset.parts)
    if isinstance(dataset, Typefaces):
        return str(dataset.root)
    if isinstance(dataset, TarShards):
        shards = [path.name for path in dataset.shards]
        return f"{text} ({', '.join(shards[:2])}{', ...' * (len(shards) > 2)})"
    return f"{text} ({dataset.split})"


def batches(source: Source, images: Dataset, options: argparse.Namespace) -> DataLoader | Batches:
    """Batches (images, labels) for a model, without the broken images, which are named on stderr.

    A forward has `options.batch_size` images or views of videos, or the views of one video where these are more.
    """
    views = getattr(source.transform, "num_views", 1)
    pin = source.device.type == "cuda"
    loader = evaluation_loader(
        images,
        source.transform,
        max(options.batch_size // views, 1),
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


def tell(name: str, images: LabelledImages) -> None:
    """Which images there were, on stderr: what a command prints on stdout is for programs, too."""
    print(f"{name}: {images.described()}", file=sys.stderr)
