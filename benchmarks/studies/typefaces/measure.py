"""One run of the study: its training, and what its last weights are worth."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from benchmarks.studies.fashion_mnist import FORWARDS_PER_UPDATE
from benchmarks.studies.typefaces import specialisation
from benchmarks.studies.typefaces.fonts import scripts
from benchmarks.studies.typefaces.report import PRIORITY
from benchmarks.studies.typefaces.routers import speeds
from benchmarks.studies.typefaces.runs import Run, comparison, forward_flops, runs_of, sizes
from vmoe_torch.budget import set_budget
from vmoe_torch.control import moe_layers, routing
from vmoe_torch.data import Typefaces, evaluation_loader
from vmoe_torch.evaluate import Task, as_rows, evaluate, fewshot, setting_grid
from vmoe_torch.train import Config, build_transforms, train
from vmoe_torch.weights.files import replacing

CAPACITY_FACTORS = (1.05, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
SHOTS = (1, 5, 10, 25)
BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75)
# Images that set_budget and thresholds are calibrated on, of the validation typefaces.
CALIBRATION = 2048
# Experts per token on average that thresholds are found for, up to K.
MEANS = (2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25)
RESULT, ROUTING = "result.json", "routing.npz"
# {part of the study: what each of its models, one seed, takes for an image}.
SPEED = {"sizes": "sizes_speed.json", "routers": "routers_speed.json"}


def execute(run: Run, folder: Path) -> dict | None:
    """Trains, or goes on, and measures the last weights; what was found stays in the run's folder.

    Returns:
        What result.json holds; None if the training was told to stop before its end.
    """
    file = folder / run.name / RESULT
    if file.exists():
        return json.loads(file.read_text())
    if run.kind == "dials":
        return _written(file, dialled(run, folder))
    config = run.config(folder)
    trained = train(config, resume=True)
    if not trained.finished:
        return None
    # The average is what a user takes; it is one of the last updates.
    model = (trained.ema or trained.model).eval()
    images = trained.updates * config.data.batch_size
    found = {
        "name": run.name,
        "kind": run.kind,
        "size": run.size,
        "seed": run.seed,
        "images": images,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_flops": forward_flops(run),
        "training_flops": FORWARDS_PER_UPDATE * forward_flops(run) * images,
        "validation": accuracy(model, config, "val"),
    }
    if run.tested:
        found |= compared(model, config) if run.compared else measured(model, config, run.size)
    return _written(file, found)


def _written(file: Path, found: dict) -> dict:
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as partial:
        Path(partial).write_text(json.dumps(found, indent=1) + "\n")
    return found


def trained_model(name: str, folder: Path) -> tuple[nn.Module, Config]:
    """The model of a finished run as it is measured, in eval mode, and the run's configuration."""
    config = next(run for run in runs_of() if run.name == name).config(folder)
    trained = train(config, resume=True)
    return (trained.ema or trained.model).eval(), config


def compared(model: nn.Module, config: Config) -> dict:
    """What the comparison of routers needs: accuracy on the test typefaces, and how much of the FLOPs was filled."""
    (row,) = as_rows(evaluate(model, _loader(model, config, _images(config, "test"))))
    return {"test": accuracy(model, config, "test"), "evaluation": row}


def measured_speeds(part: str, folder: Path) -> dict[str, dict] | None:
    """What an image takes by each router, or by each kind of each size; None as long as a model is not trained.

    One seed's models, measured once: the file stays in the folder of the runs.

    Args:
        part: "sizes" or "routers".
        folder: of the runs.

    Returns:
        {label of a router, or "kind size": what `speeds` gives}.
    """
    file = folder / SPEED[part]
    if file.exists():
        return json.loads(file.read_text())
    labelled = comparison() if part == "routers" else [(f"{run.kind} {run.size}", run) for run in sizes()]
    chosen: dict[str, Run] = {}
    for label, run in labelled:
        chosen.setdefault(label, run)
    if not all((folder / run.name / RESULT).exists() for run in chosen.values()):
        return None
    made = {label: trained_model(run.name, folder) for label, run in chosen.items()}
    model, config = next(iter(made.values()))
    images = _images(config, "val")
    some = Subset(images, order(len(images))[: config.data.batch_size])
    batches = evaluation_loader(some, _transform(model, config), config.data.batch_size, 0, False)
    return _written(file, speeds({label: model for label, (model, _) in made.items()}, *next(iter(batches))))


def dialled(run: Run, folder: Path) -> dict:
    """Test accuracy of a trained model by K, by capacity and by threshold, each from what it was trained with down."""
    model, config = trained_model(run.after, folder)
    selected = next(iter(moe_layers(model).values())).num_selected_experts
    dials = {
        "K": setting_grid([None], range(selected, 0, -1), [True]),
        "capacity": setting_grid(CAPACITY_FACTORS, [None], [True]),
        "threshold": setting_grid([None], [None], [True], [mean for mean in MEANS if mean <= selected]),
    }
    some = [images for images, _ in _loader(model, config, _some(config))]
    settings = [setting for grid in dials.values() for setting in grid]
    rows = as_rows(evaluate(model, _loader(model, config, _images(config, "test")), settings, calibration=some))
    names = [name for name, grid in dials.items() for _ in grid]
    found = {"name": run.name, "kind": run.kind, "size": run.size, "seed": run.seed, "after": run.after}
    return {**found, "dials": [{"dial": name, **row} for name, row in zip(names, rows)]}


def measured(model: nn.Module, config: Config, size: str) -> dict:
    """What the test typefaces say: accuracy, few-shot transfer; of a sparse model its curves, budgets and routing.

    Every K, both orders of claiming slots and all budgets are asked for at the middle size alone.
    """
    middle = size == "middle"
    found = {"test": accuracy(model, config, "test"), "fewshot": transfer(model, config)}
    layers = moe_layers(model)
    if not layers:
        return found
    selected = next(iter(layers.values())).num_selected_experts
    every = (range(selected, 0, -1), (False, True)) if middle else ([selected], [PRIORITY])
    settings = setting_grid(CAPACITY_FACTORS, *every)
    found["settings"] = as_rows(evaluate(model, _loader(model, config, _images(config, "test")), settings))
    found["budgets"] = {str(share): budgeted(model, config, share) for share in (BUDGETS if middle else BUDGETS[::2])}
    found["routing"] = routed(model, config)
    return found


def _images(config: Config, split: str, characters=None) -> Typefaces:
    return Typefaces(config.data.root, split, characters, mode="L")


def _some(config: Config) -> Dataset:
    """Validation images to calibrate on."""
    images = _images(config, "val")
    return Subset(images, order(len(images))[:CALIBRATION])


def _transform(model: nn.Module, config: Config) -> Callable:
    return build_transforms(config.data, model)[1]


def _loader(model: nn.Module, config: Config, images: Dataset):
    """Batches of images in an order of chance: neighbours, which share slots, are not all of one face."""
    mixed = Subset(images, order(len(images)))
    return evaluation_loader(mixed, _transform(model, config), config.data.eval_batch_size, 0, False)


def order(count: int) -> np.ndarray:
    """Of the images of a split as `_loader` has them: [i] is which one comes as number i."""
    return np.random.default_rng(0).permutation(count)


def accuracy(model: nn.Module, config: Config, split: str) -> dict[str, float]:
    """Top-1 over all images of a split, and of each face, by its name."""
    images = _images(config, split)
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == labels for x, labels in _loader(model, config, images)]).numpy()
    shown = images.face_numbers[order(len(images))]
    faces = {face.name: float(right[shown == number].mean()) for number, face in enumerate(images.faces)}
    return {"all": float(right.mean()), **faces}


def transfer(model: nn.Module, config: Config) -> list[dict]:
    """Few-shot accuracy on characters never trained on: shots from the training typefaces, tests in the test ones."""
    rows = []
    for name, characters in scripts().items():
        train, test = (_images(config, split, characters) for split in ("train", "test"))
        # What no test typeface draws cannot be asked for; shots are those that every class has.
        least = np.bincount(train.labels, minlength=len(characters)).min()
        shots = [shot for shot in SHOTS if shot <= least]
        if not shots:
            continue
        task = Task(name, train, train.labels, test, len(characters))
        rows += [
            {
                "task": name,
                "shots": each.shots,
                "seed": each.seed,
                "accuracy": each.accuracy,
                "images": each.test_images,
            }
            for each in fewshot(model, _transform(model, config), [task], shots=shots, seeds=(0, 1, 2), batch_size=256)
        ]
    return rows


def budgeted(model: nn.Module, config: Config, share: float) -> dict:
    """Accuracy at a share of the FLOPs that `set_budget` chose for on validation typefaces."""
    with routing(model):
        chosen = set_budget(model, flops=share, data=_loader(model, config, _some(config)))
        result = evaluate(model, _loader(model, config, _images(config, "test")))[0]
    return {"settings": {name: vars(each) for name, each in chosen.chosen.settings.items()}, **as_rows([result])[0]}


def routed(model: nn.Module, config: Config) -> dict[str, dict]:
    """What the experts go by on the test typefaces, layer by layer; what figures need of it stays in the folder."""
    images = _images(config, "test")
    patch = config.model.kwargs["patch_size"]
    found, arrays = specialisation.routed(
        model, _loader(model, config, images), images.face_numbers[order(len(images))], len(images.class_names), patch
    )
    with replacing(Path(config.run.output) / ROUTING) as partial, open(partial, "wb") as stream:
        np.savez_compressed(stream, **arrays)
    return found
