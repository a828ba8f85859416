"""`vmoe budget`: K and capacity of each MoE layer for a share of the compute, from some calibration images."""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import Subset

from vmoe_torch.budget import set_budget
from vmoe_torch.commands.images import add_max_broken, batches, tell
from vmoe_torch.commands.options import keep, progress, writable
from vmoe_torch.commands.sources import DATA_HELP, MODEL_HELP, open_images, open_model, save_source
from vmoe_torch.train.rules import DEVICE, Number, count

# Of what the model costs as it is set.
SHARE = Number(0, open_low=True)


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "budget",
        help="make a model cheaper without training",
        description="Chooses K and capacity of each MoE layer for a budget, on images that the model may have seen.",
        epilog="example: vmoe budget runs/mine --data IMAGES --flops 0.8 --out budget.json --save cheap.pt",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--split", metavar="NAME", default="train", help="part of the data (default: train)")
    parser.add_argument("--flops", type=float, metavar="SHARE", help="of the FLOPs as the model is set, e.g. 0.8")
    parser.add_argument("--latency", type=float, metavar="SHARE", help="of the time of a batch on this device, instead")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="of the data, at random (default: 1000)")
    parser.add_argument("--no-labels", action="store_true", help="keep close to the model as it is, labels unseen")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the images taken (default: 0)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per forward (default: 128)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    add_max_broken(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", metavar="FILE", help="write what was chosen and tried as JSON")
    parser.add_argument("--save", metavar="FILE.pt", help="write the model, set so, as a MODEL of every command")
    keep(parser, SHARE, "--flops")
    keep(parser, SHARE, "--latency")
    keep(parser, count(1), "--images")
    keep(parser, count(1), "--batch-size")
    keep(parser, count(0), "--workers")
    keep(parser, count(0), "--seed")
    keep(parser, DEVICE, "--device")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    writable(options.out)
    writable(options.save, "--save")
    if options.save is not None and not options.save.endswith(".pt"):
        raise ValueError(f"--save must end in .pt, got {options.save}")
    source = open_model(options.model, options.device)
    images = open_images(source, options.data, options.split, own_labels=options.no_labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    taken = Subset(images, order[: options.images].tolist())
    loader = batches(source, taken, options)
    data = ([batch] if options.no_labels else [batch, labels] for batch, labels in loader)
    budget = set_budget(
        source.model,
        flops=options.flops,
        latency=options.latency,
        data=data,
        progress=progress("layers"),
    )
    tell("data", images)
    print(budget)
    if options.out is not None:
        Path(options.out).write_text(json.dumps(budget.as_dict(), indent=2) + "\n", encoding="utf-8")
    if options.save is not None:
        save_source(source, options.save)
        print(f"{options.save}: the model with this routing")
    return 0
