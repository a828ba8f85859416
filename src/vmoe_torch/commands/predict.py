"""`vmoe predict`: classes of image files, or of videos."""

import argparse

import torch
from torch import Tensor

from vmoe_torch.commands import options as opt
from vmoe_torch.commands.sources import Source, open_model
from vmoe_torch.control import moe_layers
from vmoe_torch.data import BrokenImageError, ClipTransform, Video, read_image
from vmoe_torch.data.names import shown


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "predict",
        help="classify images or videos",
        description="Classifies images, or videos, with a trained model, each on its own.",
        epilog="example: vmoe predict runs/mine photo.jpg --capacity 0.5",
    )
    opt.add_model(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or videos for a model of videos")
    opt.add_views(parser)
    opt.add_number(parser, "--topk", 1, 5, "classes to show per image")
    opt.add_routing(parser)
    opt.add_device(parser)
    parser.set_defaults(run=run)


@torch.no_grad()
def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    source = open_model(options.model, options.device, average=opt.wants_average(options), views=options.views)
    model = source.model
    # An image's result does not depend on the images named beside it.
    opt.route(model, options, group_size="image" if moe_layers(model) else None)
    class_names = source.class_names or tuple(map(str, range(model.num_classes)))
    images = _read(source, options.images)
    count = min(options.topk, len(class_names))
    for path, image in zip(options.images, images):
        # The views of a video, or one image or clip.
        views = image if image.ndim == 5 else image[None]
        probabilities, classes = model(views.to(source.device)).float().softmax(1).mean(0).topk(count)
        names = [shown(class_names[label]) for label in classes.tolist()]
        width = max(map(len, names))
        print(shown(path))
        for rank, (share, name) in enumerate(zip(probabilities.tolist(), names), start=1):
            print(f"  {rank}  {name:<{width}}  {share:6.1%}")
    return 0


def _read(source: Source, paths: list[str]) -> list[Tensor]:
    """What the model sees, upright as EXIF says; all are read first, so broken ones are named before any result."""
    images, broken = [], []
    takes_videos = isinstance(source.transform, ClipTransform)
    for path in paths:
        try:
            image = Video(path, source.mode) if takes_videos else read_image(path, source.mode, exif=True)
            images.append(source.transform(image))
        except BrokenImageError as error:
            broken.append(str(error))
    if broken:
        raise ValueError("; ".join(broken))
    return images
