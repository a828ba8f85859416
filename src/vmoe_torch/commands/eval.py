"""`vmoe eval`: accuracy and FLOPs of a model at one or many routing settings, in one pass over the images."""

import argparse

from vmoe_torch.commands import options as opt
from vmoe_torch.commands.images import batches, open_images, tell
from vmoe_torch.commands.sources import open_model
from vmoe_torch.control import moe_layers
from vmoe_torch.data.sampling import sample
from vmoe_torch.evaluate import RoutingSetting, evaluate, format_table, setting_grid, write_csv, write_json

# Drawn from the data to find thresholds on, for a model that was not trained by threshold.
CALIBRATION_IMAGES = 256


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="accuracy of a model",
        description="Evaluates a model on labelled images, at every combination of the routing settings given.",
        epilog="example: vmoe eval runs/mine --data IMAGES --capacity 1.05,0.5,0.25 --k 2,1 --order vanilla,bpr. For "
        "--mean, a model that was not trained by threshold gets thresholds from some of the images, labels unseen.",
    )
    opt.add_model(parser)
    opt.add_data(parser)
    opt.add_views(parser)
    opt.add_routing(parser, several=True)
    opt.add_device(parser)
    opt.add_out(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    opt.writable(options.out)
    source = open_model(options.model, options.device, average=opt.wants_average(options), views=options.views)
    settings = [RoutingSetting()]
    calibration = None
    if options.capacity or options.k or options.order or options.mean or options.threshold:
        opt.check_sparse(source.model, options)
        settings = setting_grid(
            options.capacity or [None],
            options.k or [None],
            [opt.ORDERS[word] for word in options.order or ()] or [None],
            options.mean or [None],
            options.threshold or [None],
        )
    images = open_images(source, options.data, options.split)
    if options.mean and any(layer.router_type != "threshold" for layer in moe_layers(source.model).values()):
        calibration = [batch for batch, _ in batches(source, sample(images, CALIBRATION_IMAGES), options)]
    wrap = opt.progress(f"{len(settings)} settings on {images.described()}")
    results = evaluate(source.model, batches(source, images, options), settings, calibration=calibration, progress=wrap)
    tell("data", images)
    print(format_table(results))
    if options.out is not None:
        (write_json if options.out.endswith(".json") else write_csv)(results, options.out)
    return 0
