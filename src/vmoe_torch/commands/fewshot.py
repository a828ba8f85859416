"""`vmoe fewshot`: accuracy of linear classifiers on a model's features, learned from a few images per class."""

import argparse

from vmoe_torch.commands.images import add_max_broken, tell, warn
from vmoe_torch.commands.options import add_weights, integers, keep, progress, wants_average, writable
from vmoe_torch.commands.sources import DATA_HELP, MODEL_HELP, Source, open_images, open_model
from vmoe_torch.evaluate.transfer import SHOTS, Task, fewshot, format_fewshot, write_fewshot
from vmoe_torch.train.rules import DEVICE, count


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "fewshot",
        help="few-shot transfer of a model",
        description="Learns linear classifiers on a model's features from a few images per class, as the original: "
        "ridge regression, one strength per number of shots, the best one over all data sets.",
        epilog="example: vmoe fewshot runs/mine --data pets --data birds --shots 1,5,10 --seeds 3 --out fewshot.csv",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, action="append", metavar="DATA", help=f"{DATA_HELP}; may be repeated")
    parser.add_argument("--train-split", default="train", metavar="NAME", help="shots come from it (default: train)")
    parser.add_argument("--test-split", metavar="NAME", help="is classified (default: val, valid, validation or test)")
    parser.add_argument("--shots", type=integers, default=SHOTS, metavar="N,N", help="images per class (1,5,10,25)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="choices of images to try (default: 1)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per forward (default: 128)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    add_max_broken(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", metavar="FILE", help="write every result as CSV, or JSON if it ends in .json")
    keep(parser, count(1), "--seeds", "--batch-size")
    keep(parser, count(0), "--workers")
    keep(parser, DEVICE, "--device")
    add_weights(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    writable(options.out)
    source = open_model(options.model, options.device, average=wants_average(options))
    tasks = [_task(source, data, options.train_split, options.test_split) for data in options.data]
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
        progress=progress("features"),
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
