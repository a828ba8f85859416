"""`vmoe predict`: classes of image files."""

import argparse

import torch
from PIL import Image

import vmoe_torch
from vmoe_torch.commands.options import keep
from vmoe_torch.commands.sources import MODEL_HELP, open_model
from vmoe_torch.data import BrokenImageError, read_image
from vmoe_torch.data.names import shown
from vmoe_torch.train.rules import DEVICE, count


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "predict", help="classify images", description="Classifies images with a trained model."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="classes to show per image (default: 5)")
    parser.add_argument("--capacity-factor", type=float, metavar="C", help="slots per expert; below 1 drops tokens")
    parser.add_argument("--num-selected-experts", type=int, metavar="K", help="experts per token")
    parser.add_argument(
        "--batch-priority", action=argparse.BooleanOptionalAction, help="drop the least important tokens first"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    keep(parser, count(1), "--topk")
    keep(parser, DEVICE, "--device")
    parser.set_defaults(run=run)


@torch.no_grad()
def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    source = open_model(options.checkpoint, options.device)
    model = source.model
    changes = {
        "capacity_factor": options.capacity_factor,
        "num_selected_experts": options.num_selected_experts,
        "batch_priority": options.batch_priority,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes or vmoe_torch.moe_layers(model):
        # An image's result does not depend on the images named beside it.
        vmoe_torch.set_routing(model, **changes, group_size="image")
    class_names = source.class_names or tuple(map(str, range(model.num_classes)))
    images = [source.transform(image) for image in _read(options.images, source.mode)]
    count = min(options.topk, len(class_names))
    for path, image in zip(options.images, images):
        probabilities, classes = model(image[None].to(options.device))[0].float().softmax(0).topk(count)
        names = [shown(class_names[label]) for label in classes.tolist()]
        width = max(map(len, names))
        print(shown(path))
        for rank, (share, name) in enumerate(zip(probabilities.tolist(), names), start=1):
            print(f"  {rank}  {name:<{width}}  {share:6.1%}")
    return 0


def _read(paths: list[str], mode: str) -> list[Image.Image]:
    """The images, upright as their EXIF says; all are read first, so broken ones are named before any result."""
    images, broken = [], []
    for path in paths:
        try:
            images.append(read_image(path, mode, exif=True))
        except BrokenImageError as error:
            broken.append(str(error))
    if broken:
        raise ValueError("; ".join(broken))
    return images
