"""The `vmoe` command.

Each subcommand is a function that adds its parser and one that runs it. What a user can get wrong ends in one line on
stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

import vmoe_torch
from vmoe_torch.checkpoints import convert, export_original
from vmoe_torch.data import read_image
from vmoe_torch.parallel import GPUS, Settings, changes_that_fit, describe, plan
from vmoe_torch.recipes import load_recipe, recipe_names
from vmoe_torch.train import Config, build_transforms, load_model
from vmoe_torch.train.build import build_model, image_mode
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.loop import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="vmoe", description="Train and use V-MoE, the sparse vision transformer.")
    parser.add_argument("--version", action="version", version=f"vmoe-torch {vmoe_torch.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_train, _add_predict, _add_plan, _add_convert):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, FloatingPointError, OSError) as error:
        text = " ".join(str(error).split())
        print(f"vmoe {options.command}: {text}", file=sys.stderr)
        return 2


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Trains a model. With torchrun: torchrun --nproc-per-node N -m vmoe_torch.cli train ...",
        epilog="example: vmoe train --recipe fashion_mnist schedule.epochs=2 model.kwargs.num_experts=4",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the configuration, as optim.lr=3e-4")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--recipe", metavar="NAME", help=f"begin with a recipe: {', '.join(recipe_names())}")
    begin.add_argument("--config", metavar="FILE.json", help="begin with a configuration file, as a run's config.json")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.output, if any")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and stop")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    if options.recipe is not None:
        config = load_recipe(options.recipe)
    elif options.config is not None:
        config = Config.from_file(options.config)
    else:
        config = Config()
    config = config.override(*options.overrides)
    if options.print_config:
        print(config.to_json())
        return 0
    train(config, resume=options.resume)
    return 0


def _add_predict(commands) -> None:
    parser = commands.add_parser(
        "predict", help="classify images", description="Classifies images with the model of a run."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE", help="run folder or checkpoint file")
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="classes to show per image (default: 5)")
    parser.add_argument("--capacity-factor", type=float, metavar="C", help="slots per expert; below 1 drops tokens")
    parser.add_argument("--num-selected-experts", type=int, metavar="K", help="experts per token")
    parser.add_argument(
        "--batch-priority", action=argparse.BooleanOptionalAction, help="drop the least important tokens first"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.set_defaults(run=_predict)


@torch.no_grad()
def _predict(options: argparse.Namespace) -> int:
    if options.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {options.topk}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device must be cpu on a machine without CUDA, got {options.device}")
    model, config, class_names = load_model(options.checkpoint, options.device)
    changes = {
        "capacity_factor": options.capacity_factor,
        "num_selected_experts": options.num_selected_experts,
        "batch_priority": options.batch_priority,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes or vmoe_torch.moe_layers(model):
        # An image's result does not depend on the images named beside it.
        vmoe_torch.set_routing(model, **changes, group_size="image")
    _, transform = build_transforms(config.data, model)
    # All are read first: a broken one gives its error before any result.
    images = [transform(read_image(path, image_mode(config.model))) for path in options.images]
    count = min(options.topk, len(class_names))
    width = max(map(len, class_names))
    for path, image in zip(options.images, images):
        probabilities, classes = model(image[None].to(options.device))[0].float().softmax(0).topk(count)
        print(path)
        for rank, (share, label) in enumerate(zip(probabilities.tolist(), classes.tolist()), start=1):
            print(f"  {rank}  {class_names[label]:<{width}}  {share:6.1%}")
    return 0


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="plan a training run on many GPUs",
        description="Bytes that each GPU holds and sends, the estimated time of a step, and what to change if it does "
        "not fit. No GPU and no weights are needed.",
        epilog="example: vmoe plan --model vmoe_15b --gpus 64 --ep 32 --gpu h200 --batch 1024",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of ours, as vmoe_15b")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs")
    parser.add_argument("--ep", required=True, type=int, metavar="N", help="GPUs that share one set of experts")
    parser.add_argument("--gpu", default="h200", choices=tuple(GPUS), help="kind of GPU (default: h200)")
    parser.add_argument("--batch", required=True, type=int, metavar="N", help="images per step over all GPUs")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    with torch.device("meta"):
        model = build_model(ModelConfig(options.model), num_classes=1000)
    settings = Settings(options.gpus, options.ep, options.batch, options.gpu, options.recompute)
    result = plan(model, settings)
    print(describe(result, [] if result.fits else changes_that_fit(model, settings)))
    return 0


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints of the original JAX V-MoE, and back",
        description="Converts PREFIX.index and PREFIX.data-nnnnn-of-NNNNN to one .safetensors file, or such one back. "
        "One of SOURCE and TARGET ends in .safetensors, the other one is a PREFIX; a SOURCE may be a URL.",
        epilog="example: vmoe convert gs://vmoe_checkpoints/vmoe_s32_last2_ilsvrc2012_randaug_light1 s32.safetensors",
    )
    parser.add_argument("source", metavar="SOURCE", help="PREFIX or FILE.safetensors to read")
    parser.add_argument("target", metavar="TARGET", help="FILE.safetensors or PREFIX to write")
    parser.add_argument("--train-state", action="store_true", help="keep optimizer, step and random keys too")
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, for a file that does not say it")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="data files to write (default: 1)")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    ends = [name.endswith(".safetensors") for name in (options.source, options.target)]
    if sum(ends) != 1:
        raise ValueError(f"one of the two names must end in .safetensors, got {options.source} and {options.target}")
    if ends[1]:
        convert(options.source, options.target, train_state=options.train_state, progress=sys.stderr.isatty())
    else:
        export_original(options.source, options.target, num_heads=options.num_heads, num_shards=options.shards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
