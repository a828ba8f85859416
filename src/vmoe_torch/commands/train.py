"""`vmoe train`: a run from a recipe, a configuration file or the defaults."""

import argparse

from vmoe_torch import cores
from vmoe_torch.recipes import load_recipe, recipe_names
from vmoe_torch.train import Config, train


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Trains a model. With torchrun: torchrun --nproc-per-node N -m vmoe_torch.cli train ...",
        epilog="example: vmoe train --recipe fashion_mnist schedule.epochs=2 model.kwargs.num_experts=4",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change the configuration, as optim.lr=3e-4; the last of two for one key counts",
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--recipe", metavar="NAME", help=f"begin with a recipe: {', '.join(recipe_names())}")
    begin.add_argument("--config", metavar="FILE.json", help="begin with a configuration file, as a run's config.json")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.output, if any")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and stop")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
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
    config.check(given={text.partition("=")[0] for text in options.overrides})
    cores.share(config.data.workers)
    train(config, resume=options.resume)
    return 0
