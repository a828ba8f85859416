"""`vmoe fewshot`: accuracy of linear classifiers on a model's features, learned from a few images per class."""

import argparse

from vmoe_torch.commands import options as opt
from vmoe_torch.commands.images import open_images, tell, warn
from vmoe_torch.commands.sources import Source, open_model
from vmoe_torch.evaluate.transfer import SHOTS, Task, fewshot, format_fewshot, write_fewshot


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "fewshot",
        help="few-shot transfer of a model",
        description="Learns linear classifiers on a model's features from a few images per class, as the original: "
        "ridge regression, one strength per number of shots, the best one over all data sets.",
        epilog="example: vmoe fewshot runs/mine --data pets --data birds --shots 1,5,10 --seeds 3 --out fewshot.csv",
    )
    opt.add_model(parser)
    opt.add_data(parser, several=True)
    parser.add_argument("--train-split", default="train", metavar="NAME", help="shots come from it (default: train)")
    parser.add_argument("--shots", type=opt.integers, default=SHOTS, metavar="N,N", help="images per class (1,5,10,25)")
    opt.add_number(parser, "--seeds", 1, 1, "choices of images to try")
    opt.add_routing(parser)
    opt.add_device(parser)
    opt.add_out(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    opt.writable(options.out)
    source = open_model(options.model, options.device, average=opt.wants_average(options))
    opt.route(source.model, options)
    tasks = [_task(source, data, options.train_split, options.split) for data in options.data]
    results = fewshot(
        source.model,
        source.transform,
        tasks,
        shots=options.shots,
        seeds=range(options.seeds),
        batch_size=options.batch_size,
        workers=options.workers,
        max_broken=options.max_broken,
        warn=warn,
        progress=opt.progress("features"),
    )
    for task in tasks:
        tell("shots from", task.train)
        tell("test images", task.test)
    print(format_fewshot(results))
    if options.out is not None:
        write_fewshot(results, options.out)
    return 0


def _task(source: Source, data: str, train_split: str, test_split: str | None) -> Task:
    train = open_images(source, data, train_split, own_labels=True)
    test = open_images(source, data, test_split, own_labels=True, class_names=train.class_names)
    labels = train.labels()
    if train.class_names is None:
        return Task(data, train, labels, test, int(labels.max()) + 1)
    return Task(data, train, labels, test, len(train.class_names))
