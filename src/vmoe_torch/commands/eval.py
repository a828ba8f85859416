"""`vmoe eval`: accuracy and FLOPs of a model at one or many routing settings, in one pass over the images."""

import argparse

from vmoe_torch.commands.images import add_max_broken, batches, tell
from vmoe_torch.commands.options import ORDERS, integers, keep, numbers, progress, words, writable
from vmoe_torch.commands.sources import DATA_HELP, MODEL_HELP, open_images, open_model
from vmoe_torch.control import moe_layers
from vmoe_torch.evaluate import RoutingSetting, evaluate, format_table, setting_grid, write_csv, write_json
from vmoe_torch.train.rules import DEVICE, count


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="accuracy of a model",
        description="Evaluates a model on labelled images, at every combination of the routing settings given.",
        epilog="example: vmoe eval runs/mine --data IMAGES --capacity 1.05,0.5,0.25 --k 2,1 --order vanilla,bpr",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--split", metavar="NAME", help="part of the data (default: val, valid, validation or test)")
    parser.add_argument("--capacity", type=numbers, metavar="C,C", help="slots per expert, times the balanced load")
    parser.add_argument("--k", type=integers, metavar="K,K", help="experts per token")
    parser.add_argument("--order", type=words(*ORDERS), metavar="ORDER,ORDER", help="who drops last: vanilla, bpr")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per forward (default: 128)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    add_max_broken(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", metavar="FILE", help="write every number as CSV, or JSON if it ends in .json")
    keep(parser, count(1), "--batch-size")
    keep(parser, count(0), "--workers")
    keep(parser, DEVICE, "--device")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    writable(options.out)
    source = open_model(options.model, options.device)
    asked = options.capacity or options.k or options.order
    if asked and not moe_layers(source.model):
        raise ValueError(f"--capacity, --k and --order need a model with MoE layers, got {options.model}")
    settings = [RoutingSetting()]
    if asked:
        settings = setting_grid(
            options.capacity or [None], options.k or [None], [ORDERS[word] for word in options.order or ()] or [None]
        )
    images = open_images(source, options.data, options.split)
    wrap = progress(f"{len(settings)} settings on {images.described()}")
    results = evaluate(source.model, batches(source, images, options), settings, progress=wrap)
    tell("data", images)
    print(format_table(results))
    if options.out is not None:
        (write_json if options.out.endswith(".json") else write_csv)(results, options.out)
    return 0
