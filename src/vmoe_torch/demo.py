"""`python -m vmoe_torch.demo`: trains a small V-MoE on images that ship with the package, then turns its compute down.

The same weights are evaluated at several capacities, with two experts per token and with one, with the tokens claiming
their slots by position (vanilla) and by priority (BPR). Ends with a table and an HTML report. Two CPU cores and a few
minutes are enough; run again, it goes on where it stopped.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from vmoe_torch.analyze import (
    Figure,
    LayerRouting,
    Report,
    Section,
    Table,
    capacity_curve,
    collect_routing,
    expert_by_class,
    gate_histograms,
    kept_choices_per_patch,
    kept_patches_grid,
    write_report,
)
from vmoe_torch.control import routing
from vmoe_torch.data import FashionMnist, evaluation_loader
from vmoe_torch.evaluate import Evaluation, evaluate, format_table, setting_grid, write_csv, write_json
from vmoe_torch.train import Config, build_transforms, train

CAPACITY_FACTORS = (1.05, 0.5, 0.25, 0.1)
NUM_SELECTED_EXPERTS = (2, 1)
GROUP_IMAGES = 8
# Whole groups, so that no smaller last group rounds its capacity on its own.
BATCH_IMAGES = 25 * GROUP_IMAGES

CONFIG = Config.from_dict(
    {
        "model": {
            "name": "test_vmoe",
            "kwargs": {
                "img_size": 28,
                "patch_size": 4,
                "in_chans": 1,
                "embed_dim": 96,
                "depth": 4,
                "num_heads": 3,
                "mlp_ratio": 2.0,
                "moe_layers": "every2",
                "num_experts": 8,
                "num_selected_experts": 2,
                "capacity_factor": 1.05,
                # A group has 392 tokens; going up to a multiple of 4 would make 0.1 a 0.12, and 0.16 with one expert.
                "capacity_multiple_of": 0,
                "group_size": GROUP_IMAGES,
                "class_token": False,
                "global_pool": "avg",
                "pos_embed": "sincos2d",
            },
        },
        "data": {
            "name": "fashion_mnist",
            "batch_size": 32,
            "eval_batch_size": BATCH_IMAGES,
            "scale": (0.85, 1.0),
            "ratio": (1.0, 1.0),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
        # Muon reaches the accuracy in fewer updates than AdamW, which keeps the experts and routers.
        "optim": {"name": "muon", "lr": 4e-3, "betas": (0.9, 0.98), "momentum": 0.95},
        "schedule": {"epochs": 10, "warmup_epochs": 0.5},
    }
)


def main(arguments: list[str] | None = None) -> Path:
    """Trains, evaluates, prints the table; returns the path of the report.

    Raises:
        ValueError: if an option is out of its range, or the folder holds another run; before any training.
    """
    options = _parser().parse_args(arguments)
    if options.test_images is not None and options.test_images < 1:
        raise ValueError(f"--test-images must be at least 1, got {options.test_images}")
    out = Path(options.out)
    config = CONFIG.override(f"run.output={out / 'train'}", f"schedule.epochs={options.epochs}")
    if options.max_updates is not None:
        config = config.override(f"run.max_updates={options.max_updates}")
    out.mkdir(parents=True, exist_ok=True)

    result, seconds = _train(config, out / "train_seconds.txt")
    if not result.finished and options.max_updates is None:
        raise SystemExit(f"stopped after {result.updates} updates; run again to go on")
    model = result.model
    dataset = FashionMnist("test")
    if options.test_images is not None:
        dataset = Subset(dataset, range(min(options.test_images, len(dataset))))
    loader = evaluation_loader(dataset, build_transforms(config.data, model)[1], BATCH_IMAGES, 0, False)

    settings = setting_grid(CAPACITY_FACTORS, NUM_SELECTED_EXPERTS)
    evaluations = evaluate(model, loader, settings, progress=_progress(f"evaluating {len(settings)} settings"))
    routings = collect_routing(model, loader, len(result.class_names), progress=_progress("looking at the routers"))
    write_csv(evaluations, out / "results.csv")
    write_json(evaluations, out / "results.json")
    sections = [
        _training_section(config, model, result.updates, seconds, len(dataset)),
        _result_section(evaluations),
        _expert_section(routings, result.class_names),
        _patch_section(model, dataset, loader, result.class_names),
        _file_section(),
    ]
    report = write_report(Report("One V-MoE, less and less compute", _summary(evaluations), sections), out)

    print("\nThe same weights at every setting (K: experts per token; slots: capacity factor after rounding):\n")
    print(format_table(evaluations))
    print(f"\nReport: {report.resolve()}")
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m vmoe_torch.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder of the run and its report (%(default)s)")
    parser.add_argument("--epochs", type=int, default=CONFIG.schedule.epochs, help="epochs to train (%(default)s)")
    parser.add_argument("--max-updates", type=int, help="stop the training after so many updates")
    parser.add_argument("--test-images", type=int, help="evaluate on the first so many test images only")
    return parser


def _train(config: Config, clock: Path):
    """Trains, or goes on; returns the result and the seconds spent so far, which `clock` keeps between calls."""
    before = float(clock.read_text()) if clock.exists() else 0.0
    start = time.monotonic()
    try:
        result = train(config, resume=True)
    finally:
        seconds = before + time.monotonic() - start
        clock.write_text(f"{seconds:.1f}\n")
    return result, seconds


def _progress(text: str):
    return lambda batches: tqdm(batches, desc=text, disable=not sys.stderr.isatty())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _by_setting(evaluations: list[Evaluation]) -> dict[tuple[int, float, bool], Evaluation]:
    """By experts per token, asked capacity, and BPR."""
    return {
        (e.setting.num_selected_experts, e.setting.capacity_factor, e.setting.batch_priority): e for e in evaluations
    }


def _summary(evaluations: list[Evaluation]) -> list[str]:
    found = _by_setting(evaluations)
    full = found[2, 1.05, True]
    low, position = found[2, 0.25, True], found[2, 0.25, False]
    return [
        f"A small vision mixture of experts, trained once with 2 of 8 experts per token, reaches {_percent(full.top1)} "
        f"on {full.images:,} test images of Fashion-MNIST. Its compute is then turned down without any retraining: "
        "every expert gets fewer slots, and tokens that find no slot skip the layer and keep only their residual.",
        f"At a quarter of the balanced load ({low.flops.total / 1e6:.1f} instead of {full.flops.total / 1e6:.1f} "
        f"MFLOPs per image) it reaches {_percent(low.top1)} when the most important tokens claim their slots first "
        f"(Batch Priority Routing, BPR), and {_percent(position.top1)} when they claim them by position (vanilla).",
    ]


def _training_section(config: Config, model: nn.Module, updates: int, seconds: float, test_images: int) -> Section:
    kwargs = config.model.kwargs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Section(
        "What was trained",
        facts={
            "Model": f"V-MoE with {kwargs['depth']} blocks of width {kwargs['embed_dim']}, every second one with "
            f"{kwargs['num_experts']} experts, of which a token uses {kwargs['num_selected_experts']}; "
            f"{kwargs['patch_size']} x {kwargs['patch_size']} patches; {parameters:,} parameters",
            "Routing": f"groups of {kwargs['group_size']} images ({kwargs['group_size'] * 49} tokens), capacity factor "
            f"{kwargs['capacity_factor']} with BPR; the capacity is rounded up to whole slots only",
            "Data": f"the Fashion-MNIST subset that ships with the package: {len(FashionMnist('train')):,} training "
            f"images, {test_images:,} test images here",
            "Training": f"{updates:,} updates of {config.data.batch_size} images with {config.optim.name}, "
            f"learning rate {config.optim.lr:g}, {config.schedule.name} schedule over {config.schedule.epochs} epochs",
            "Time": f"{seconds:.0f} s, with the checks after every epoch",
            "Machine": _machine(),
        },
    )


def _machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{device}; Python {platform.python_version()}, PyTorch {torch.__version__}"


def _result_section(evaluations: list[Evaluation]) -> Section:
    found = _by_setting(evaluations)
    rows, best, breaks = [], set(), set()
    for selected in NUM_SELECTED_EXPERTS:
        breaks.add(len(rows))
        for capacity in CAPACITY_FACTORS:
            vanilla, priority = (found[selected, capacity, order] for order in (False, True))
            best.add((len(rows), 5 if priority.top1 >= vanilla.top1 else 4))
            rows.append(
                (
                    str(selected),
                    f"{capacity:g}",
                    f"{priority.flops.total / 1e6:.2f}",
                    f"{priority.flops.relative:.2f}",
                    f"{100 * vanilla.top1:.1f}",
                    f"{100 * priority.top1:.1f}",
                    f"{100 * vanilla.unprocessed:.0f}",
                )
            )
    header = ("experts per token", "capacity factor", "MFLOPs per image", "times dense", "vanilla top-1 %")
    header += ("BPR top-1 %", "skipped tokens %")
    low = found[1, 0.1, True]
    return Section(
        "Accuracy and compute of the same weights",
        paragraphs=[
            "The capacity factor sets how many slots the experts have for every choice that a token makes; 1 is just "
            "enough if the load is balanced. FLOPs count the matrix products of one forward pass with every slot, used "
            "or not; “times dense” compares them with the same network with one plain MLP in place of each "
            "layer of experts (which was not trained here). “Skipped” tokens found no slot at any expert (vanilla). "
            f"Slots are whole: an asked capacity of 0.1 with one expert per token is {low.capacity_factor:.3f}."
        ],
        table=Table(header, rows, frozenset(best), frozenset(breaks - {0})),
        figures=[
            Figure(
                "capacity_curve",
                capacity_curve(evaluations),
                "Fewer slots per expert, from right to left. " + _gap(found, 0.1) + " " + _gap(found, 0.5),
                "Test accuracy against capacity factor for vanilla routing and BPR with two experts per token and one",
            ),
            Figure(
                "compute_curve",
                capacity_curve(evaluations, "flops"),
                "The same points against compute. Along each line the capacity falls from right to left; lines of one "
                "expert per token start at about half of the experts' compute.",
                "Test accuracy against MFLOPs per image for vanilla routing and BPR with two experts per token and one",
            ),
        ],
    )


def _gap(found: dict, capacity: float) -> str:
    vanilla, priority = (found[2, capacity, order].top1 for order in (False, True))
    return f"At {capacity:g} with two experts, BPR reaches {_percent(priority)} and vanilla {_percent(vanilla)}."


def _expert_section(routings: dict[str, LayerRouting], class_names: tuple[str, ...]) -> Section:
    figures = []
    for name, routed in routings.items():
        share = routed.expert_share
        label, expert = divmod(int(share.argmax()), share.shape[1])
        figures.append(
            Figure(
                f"experts_{name.replace('.', '_')}",
                expert_by_class(routed, class_names, name),
                f"Layer {name}. Each column adds up to 100%. The most specialised pair: expert {expert} processes "
                f"{_percent(float(share.max()))} of what is kept of class {class_names[label]}; spread evenly, every "
                f"cell would be {_percent(1 / share.shape[1])}. Experts and classes are ordered so that neighbours "
                "look alike.",
                f"Heat map of experts by classes in layer {name}",
            )
        )
    gates = Figure(
        "gates",
        gate_histograms(routings),
        "Left: the share of the work that each expert does, and the choices that found their expert full. Right: how "
        "sure the router is of its first and second choice; the closer to 1, the more one expert counts.",
        "Bar charts of expert load and histograms of the gates for each layer of experts",
    )
    return Section(
        "Who processes what",
        paragraphs=["Measured on the test images at the capacity and with the number of experts of the training."],
        figures=[*figures, gates],
    )


def _patch_section(model: nn.Module, dataset: Dataset, loader: DataLoader, class_names: tuple[str, ...]) -> Section:
    chosen = _one_per_class(dataset)
    tensors = torch.stack([loader.dataset[index][0] for index in chosen])
    pictures = torch.stack([_picture(dataset[index][0]) for index in chosen])
    rows: dict[str, list[tuple[str, Tensor]]] = {}
    for capacity in CAPACITY_FACTORS:
        for priority, order in ((False, "vanilla"), (True, "BPR")):
            with routing(model, capacity_factor=capacity, batch_priority=priority):
                for name, kept in kept_choices_per_patch(model, tensors).items():
                    rows.setdefault(name, []).append((f"C = {capacity:g}\n{order}", kept))
    names = [class_names[dataset[index][1]] for index in chosen]
    return Section(
        "Which patches each capacity keeps",
        paragraphs=[
            f"The {len(chosen)} images form one group and share the slots; below each picture stands how many of its "
            "patches at least one expert processed. Pale blue patches skip the layer."
        ],
        figures=[
            Figure(
                f"patches_{name.replace('.', '_')}",
                kept_patches_grid(pictures, layer_rows, names, f"Patches processed by the experts of {name}"),
                f"Layer {name}, two experts per token. Vanilla serves images from left to right, whatever they show: "
                "at a low capacity little is left for the last ones. BPR serves the patches with the largest gates "
                "of all images first.",
                f"Grid of images with the dropped patches hidden, by capacity and order, in layer {name}",
            )
            for name, layer_rows in rows.items()
        ],
        wide=True,
    )


def _one_per_class(dataset: Dataset) -> list[int]:
    """Numbers of the first images that each show another class, one group at most."""
    first: dict[int, int] = {}
    for index in range(len(dataset)):
        first.setdefault(dataset[index][1], index)
        if len(first) == GROUP_IMAGES:
            break
    return list(first.values())


def _picture(image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width) / 255


def _file_section() -> Section:
    return Section(
        "Files",
        links={
            "results.csv: every number of the table and more": "results.csv",
            "results.json: the same as JSON": "results.json",
            "train/: configuration, log, TensorBoard events and checkpoints of the training": "train/",
        },
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"demo: {error}")
