"""`vmoe plan`: bytes and time of a run on many GPUs, on paper."""

import argparse

import torch

from vmoe_torch.commands.options import keep
from vmoe_torch.commands.sources import open_model
from vmoe_torch.parallel import GPUS, Settings, changes_that_fit, describe, plan
from vmoe_torch.train.build import build_model
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.rules import count
from vmoe_torch.weights.sources import is_weights


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="plan a training run on many GPUs",
        description="Bytes that each GPU holds and sends in vmoe train with run.precision=bfloat16, the estimated time "
        "of a step, and what to change if it does not fit. No GPU and no weights are needed.",
        epilog="example: vmoe plan --model vmoe_15b --gpus 64 --ep 32 --gpu h200 --batch 1024",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="name of a model of ours, or its weights")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs")
    parser.add_argument("--ep", required=True, type=int, metavar="N", help="GPUs that share one set of experts")
    parser.add_argument("--gpu", default="h200", choices=tuple(GPUS), help="kind of GPU (default: h200)")
    parser.add_argument("--batch", required=True, type=int, metavar="N", help="images per step over all GPUs")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward")
    keep(parser, count(1), "--gpus")
    keep(parser, count(1), "--ep")
    keep(parser, count(1), "--batch")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    if is_weights(options.model):
        model = open_model(options.model).model
    else:
        with torch.device("meta"):
            model = build_model(ModelConfig(options.model), num_classes=1000)
    settings = Settings(options.gpus, options.ep, options.batch, options.gpu, options.recompute, autocast=True)
    result = plan(model, settings)
    print(describe(result, [] if result.fits else changes_that_fit(model, settings)))
    return 0
