"""`vmoe plan`: bytes and time of a run on many GPUs, on paper."""

import argparse

import torch

from vmoe_torch.commands.options import add_number, add_routing, route
from vmoe_torch.parallel import GPUS, PlannedRun, changes_that_fit, describe, plan
from vmoe_torch.train.build import build_model
from vmoe_torch.train.config import ModelConfig


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="plan a training run on many GPUs",
        description="Bytes that each GPU holds and sends in vmoe train with run.precision=bfloat16, the estimated time "
        "of a step, and what to change if it does not fit. No GPU and no weights are needed.",
        epilog="example: vmoe plan vmoe_15b --gpus 64 --ep 32 --gpu h200 --batch-size 1024",
    )
    parser.add_argument("model", metavar="MODEL", help="name of a model of ours, as vmoe_15b")
    add_number(parser, "--gpus", 1, None, "number of GPUs")
    add_number(parser, "--ep", 1, None, "GPUs that share one set of experts")
    parser.add_argument("--gpu", default="h200", choices=tuple(GPUS), help="kind of GPU (default: h200)")
    add_number(parser, "--batch-size", 1, None, "images per forward, over all GPUs")
    add_routing(parser, order=False)
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    with torch.device("meta"):
        model = build_model(ModelConfig(options.model), num_classes=1000)
    route(model, options)
    settings = PlannedRun(options.gpus, options.ep, options.batch_size, options.gpu, options.recompute, autocast=True)
    result = plan(model, settings)
    print(describe(result, [] if result.fits else changes_that_fit(model, settings)))
    return 0
