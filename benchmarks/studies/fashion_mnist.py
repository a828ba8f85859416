"""A V-MoE against the dense ViT of its width and depth on the whole of Fashion-MNIST, and with less and less capacity.

    python -m benchmarks.studies.fashion_mnist [--root DIR] [--seeds 0 1 2] [--jobs 2]

For every seed it trains three models by the recipes `fashion_mnist` and `fashion_mnist_dense`: the V-MoE; the dense ViT
for as many updates; and the dense ViT for at least as many training FLOPs, in whole epochs. Then it evaluates the
V-MoE's weights on the test images at every capacity, with two experts per token and with one, vanilla and BPR. Every
run is a process of one thread; a run that was stopped goes on, a finished one is not repeated. Writes
benchmarks/results/fashion_mnist/results.{json,md} and docs/figures/capacity_curve.png.
"""

import csv
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.results import RESULTS, command_line, environment, publish
from benchmarks.studies.fashion_mnist_report import figure, markdown
from vmoe_torch.data import evaluation_loader
from vmoe_torch.evaluate import as_rows, count_flops, evaluate, setting_grid
from vmoe_torch.files import write_json
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config, TrainResult, build_data, build_model, build_transforms, train
from vmoe_torch.train.build import image_mode

CAPACITY_FACTORS = (1.05, 0.5, 0.25, 0.15, 0.1)
NUM_SELECTED_EXPERTS = (2, 1)
# The pages show them from here.
FIGURES = Path(__file__).parents[2] / "docs" / "figures"
# Where Debian's package dataset-fashion-mnist puts the IDX files.
ROOT = Path("/usr/share/datasets/fashion-mnist")
# A backward has two products for each of the forward's.
FORWARDS_PER_UPDATE = 3


@dataclass(frozen=True)
class Run:
    """One training run: the key of its model ("vmoe", "dense_steps" or "dense_flops"), its seed and configuration."""

    model: str
    seed: int
    config: Config


def plan(seeds: Sequence[int], root: Path, folder: Path, changes: Sequence[str] = ()) -> list[Run]:
    """The runs of a study, the longest of each seed first; `changes` are overrides of both recipes."""
    sparse, dense = (load_recipe(name).override(*changes) for name in ("fashion_mnist", "fashion_mnist_dense"))
    epochs = math.ceil(sparse.schedule.epochs * forward_flops(sparse) / forward_flops(dense))
    configs = {
        "vmoe": sparse,
        "dense_flops": dense.override(f"schedule.epochs={epochs}"),
        "dense_steps": dense,
    }
    return [
        Run(
            model,
            seed,
            config.override(
                f"data.root={root}",
                f"run.seed={seed}",
                f"run.output={folder / f'{model}_{seed}'}",
                "run.device=cpu",
                "run.progress=false",
                "run.tensorboard=false",
            ),
        )
        for seed in seeds
        for model, config in configs.items()
    ]


def forward_flops(config: Config) -> float:
    """FLOPs per image of a forward at the capacity of the training."""
    model = build_model(config.model, 10)
    side = config.model.kwargs["img_size"]
    group = config.model.kwargs["group_size"]
    return count_flops(model, torch.zeros(group, config.model.kwargs["in_chans"], side, side)).total


def execute(run: Run) -> dict:
    """Trains, or goes on, and evaluates the last weights; returns what was found, which run.output keeps.

    Raises:
        RuntimeError: if the training was told to stop before its end.
    """
    file = Path(run.config.run.output) / "result.json"
    start = time.monotonic()
    # Of a finished run, this checks that it is the same one, and reads its weights.
    trained = train(run.config, resume=True)
    if not trained.finished:
        raise RuntimeError(f"{file.parent} was stopped after {trained.updates} updates; start again to go on")
    if file.exists():
        return json.loads(file.read_text())
    seconds = time.monotonic() - start
    found = {
        "model": run.model,
        "seed": run.seed,
        "epochs": run.config.schedule.epochs,
        "updates": trained.updates,
        "images": trained.updates * run.config.data.batch_size,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "training_flops": FORWARDS_PER_UPDATE
        * forward_flops(run.config)
        * trained.updates
        * run.config.data.batch_size,
        # Of this process, so not of what went before where a run was stopped.
        "training_seconds": seconds,
        "top1": _last_accuracy(file.parent / "metrics.csv"),
    }
    if run.model == "vmoe":
        found["settings"] = as_rows(_evaluate(run.config, trained))
    write_json("result", file, found)
    return found


def _last_accuracy(metrics: Path) -> float:
    """Top-1 after the last update, not the best: the validation images are the test images."""
    with open(metrics, newline="") as file:
        return float(list(csv.DictReader(file))[-1]["val_accuracy"])


def _evaluate(config: Config, trained: TrainResult):
    data = build_data(config.data, image_mode(config.model))
    transform = build_transforms(config.data, trained.model)[1]
    loader = evaluation_loader(data.val, transform, config.data.eval_batch_size, 0, False)
    return evaluate(trained.model, loader, setting_grid(CAPACITY_FACTORS, NUM_SELECTED_EXPERTS))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is missing, writes the results; returns the path of the Markdown file."""
    parser = command_line(__doc__, RESULTS / "fashion_mnist")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="overrides of both recipes")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the four IDX files (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies_fashion_mnist"), help="(%(default)s)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of capacity_curve.png (%(default)s)")
    options = parser.parse_args(arguments)
    # Before hours of work, so that a commit made meanwhile is not taken for the one that ran.
    made = environment(torch.device("cpu"))
    made["threads"] = f"1 for each of {options.jobs} runs at a time"
    runs = plan(options.seeds, options.root, options.runs, options.changes)
    # A forked child would inherit the parent's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        for future in as_completed(futures):
            run, found = futures[future], future.result()
            print(f"{run.model}, seed {run.seed}: {found['top1']:.2%}, {found['training_seconds']:.0f} s", flush=True)
    results = [future.result() for future in futures]
    path = publish(options.out, "results", {"environment": made, "runs": results}, lambda _: markdown(results, made))
    options.figures.mkdir(parents=True, exist_ok=True)
    figure(results).savefig(options.figures / "capacity_curve.png", dpi=150)
    return path


if __name__ == "__main__":
    main()
