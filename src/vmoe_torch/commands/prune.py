"""`vmoe prune`: a trained model with fewer experts, or with the experts of each layer averaged into one MLP."""

import argparse
import dataclasses

from torch import nn

from vmoe_torch.commands import options as opt
from vmoe_torch.commands.images import batches, open_images, tell
from vmoe_torch.commands.sources import Source, open_model, save_source
from vmoe_torch.control import moe_layers
from vmoe_torch.data.sampling import sample
from vmoe_torch.evaluate import ExpertUsage, expert_usage
from vmoe_torch.models.averaging import averaged_layers, to_dense
from vmoe_torch.models.pruning import kept_experts, new_arguments, prune_experts, wanted_experts
from vmoe_torch.train.rules import Number


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "prune",
        help="drop experts without training",
        description="Drops the experts whose routers moved least in fine-tuning, or that fewest tokens of "
        "--data choose; "
        "or averages the experts of each layer into the MLP of a dense model. Writes a MODEL of every command.",
        epilog="example: vmoe prune runs/mine small.pt --keep 0.5 --data IMAGES",
    )
    opt.add_model(parser)
    parser.add_argument("out", metavar="OUT.pt", help="file to write")
    text = "experts of each layer that stay, or their share where it has a point, as 0.5"
    opt.add_option(parser, "--keep", Number(0, open_low=True), type=_number, metavar="N", help=text)
    parser.add_argument("--average", action="store_true", help="average the experts instead, by use with --data")
    parser.add_argument("--before", metavar="MODEL", help="the same model before it was fine-tuned")
    opt.add_data(parser, split="train", required=False)
    opt.add_sample(parser, 1000)
    opt.add_routing(parser)
    opt.add_device(parser)
    parser.set_defaults(run=run)


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    opt.writable(options.out, "OUT")
    if not options.out.endswith(".pt"):
        raise ValueError(f"OUT must end in .pt, got {options.out}")
    if options.average == (options.keep is not None):
        raise ValueError(f"one of --keep and --average must be given, got {'both' if options.average else 'neither'}")
    if options.average and options.before is not None:
        raise ValueError("--before must go with --keep, got it with --average")
    if not options.average and (options.before is None) == (options.data is None):
        raise ValueError(f"one of --before and --data must be given, got {'both' if options.data else 'neither'}")
    source = open_model(options.model, options.device, average=opt.wants_average(options))
    opt.check_sparse(source.model, options, "to be pruned")
    opt.route(source.model, options)
    # Before images are read.
    if source.config is not None and source.config.model.upcycle:
        raise ValueError("MODEL must not be of a run that upcycled: its configuration cannot say what it has become")
    if options.average:
        averaged_layers(source.model)
    else:
        wanted_experts(source.model, options.keep)
    usage = None if options.data is None else _usage(source, options)
    before = moe_layers(source.model)
    if options.average:
        model = to_dense(source.model, usage=usage)
        lines = [f"{name}: the average of {layer.num_experts} experts" for name, layer in before.items()]
    else:
        kept = kept_experts(source.model, options.keep, before=options.before, usage=usage)
        model = prune_experts(source.model, kept)
        lines = [f"{name}: experts {', '.join(map(str, kept[name]))} of {before[name].num_experts}" for name in kept]
    save_source(_become(source, model), options.out)
    print("\n".join(lines))
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (source.model, model)]
    print(f"{options.out}: {counts[1] / 1e6:.2f} M parameters, of {counts[0] / 1e6:.2f} M")
    return 0


def _usage(source: Source, options: argparse.Namespace) -> dict[str, ExpertUsage]:
    images = open_images(source, options.data, options.split, own_labels=True)
    taken = sample(images, options.images, options.seed)
    loaded = opt.progress("batches")(batches(source, taken, options))
    usage = expert_usage(source.model, (batch for batch, _ in loaded))
    tell("data", images)
    return usage


def _become(source: Source, model: nn.Module) -> Source:
    """The source with this model, and a configuration that makes it."""
    config = source.config
    if config is None:
        return dataclasses.replace(source, model=model)
    # All other routing that was chosen is told by the weights.
    own = dataclasses.replace(config.model, kwargs=new_arguments(model, config.model.kwargs))
    return dataclasses.replace(source, model=model, config=dataclasses.replace(config, model=own))
