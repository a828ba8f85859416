"""`vmoe budget`: K and capacity of each MoE layer for a share of the compute, from some calibration images."""

import argparse

from vmoe_torch.budget import set_budget
from vmoe_torch.commands import options as opt
from vmoe_torch.commands.images import batches, open_images, tell
from vmoe_torch.commands.sources import open_model, save_source
from vmoe_torch.data.sampling import sample
from vmoe_torch.files import write_json
from vmoe_torch.train.rules import Number

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
    opt.add_model(parser)
    opt.add_data(parser, split="train")
    opt.add_sample(parser, 1000)
    text = "of the FLOPs as the model is set, e.g. 0.8"
    opt.add_option(parser, "--flops", SHARE, type=float, metavar="SHARE", help=text)
    text = "of the time of a batch on this device, instead"
    opt.add_option(parser, "--latency", SHARE, type=float, metavar="SHARE", help=text)
    parser.add_argument("--no-labels", action="store_true", help="keep close to the model as it is, labels unseen")
    opt.add_routing(parser)
    opt.add_device(parser)
    opt.add_out(parser, "what was chosen and tried as JSON")
    parser.add_argument("--save", metavar="FILE.pt", help="write the model, set so, as a MODEL of every command")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    opt.writable(options.out)
    opt.writable(options.save, "--save")
    if options.save is not None and not options.save.endswith(".pt"):
        raise ValueError(f"--save must end in .pt, got {options.save}")
    source = open_model(options.model, options.device, average=opt.wants_average(options))
    opt.route(source.model, options)
    images = open_images(source, options.data, options.split, own_labels=options.no_labels)
    loader = batches(source, sample(images, options.images, options.seed), options)
    data = ([batch] if options.no_labels else [batch, labels] for batch, labels in loader)
    budget = set_budget(
        source.model,
        flops=options.flops,
        latency=options.latency,
        data=data,
        progress=opt.progress("layers"),
    )
    tell("data", images)
    print(budget)
    if options.out is not None:
        write_json("budget", options.out, budget.as_dict())
    if options.save is not None:
        save_source(source, options.save)
        print(f"{options.save}: the model with this routing")
    return 0
