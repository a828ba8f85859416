"""One run of the study: its training, and what its last weights are worth."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from benchmarks.harness.results import environment
from benchmarks.studies.fashion_mnist import FORWARDS_PER_UPDATE
from benchmarks.studies.typefaces import specialisation
from benchmarks.studies.typefaces.earlier import RESULT, write_result
from benchmarks.studies.typefaces.fonts import scripts
from benchmarks.studies.typefaces.report import PRIORITY
from benchmarks.studies.typefaces.routers import speeds
from benchmarks.studies.typefaces.runs import SEEDS, Run, comparison, forward_flops, sizes
from vmoe_torch.budget import set_budget
from vmoe_torch.control import moe_layers, routing
from vmoe_torch.data import Typefaces, evaluation_loader
from vmoe_torch.evaluate import Task, as_rows, evaluate, fewshot, setting_grid
from vmoe_torch.files import replacing
from vmoe_torch.train import Config, build_model, build_transforms, train

CAPACITY_FACTORS = (1.05, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
SHOTS = (1, 5, 10, 25)
BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75)
# Images that set_budget and thresholds are calibrated on, of the validation typefaces.
CALIBRATION = 2048
# Experts per token on average that thresholds are found for, up to K.
MEANS = (2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25)
ROUTING = "routing.npz"
# Parts of the study that say what an image takes.
SPEED = ("sizes", "routers")


def execute(run: Run, folder: Path) -> dict | None:
    """Trains, or goes on, and measures the last weights; what was found stays in the run's folder.

    Returns:
        What result.json holds; None if the training was told to stop before its end.
    """
    file = folder / run.name / RESULT
    if file.exists():
        return json.loads(file.read_text())
    if run.kind == "dials":
        return write_result(file, dialled(run, folder))
    config = run.config(folder)
    trained = train(config, resume=True)
    if not trained.finished:
        return None
    # The average is what a user takes; it is one of the last updates.
    model = (trained.ema or trained.model).eval()
    images = trained.updates * config.data.batch_size
    result = {
        **told(run),
        "images": images,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_flops": forward_flops(run),
        "training_flops": FORWARDS_PER_UPDATE * forward_flops(run) * images,
        "validation": accuracy(model, config, "val"),
    }
    if run.tested:
        result |= compared(model, config) if run.compared else measured(model, config, run)
    return write_result(file, result)


def told(run: Run) -> dict:
    """How a result begins: whose it is, and what measured it."""
    own = environment(torch.device("cpu"))
    return {
        "name": run.name,
        "measured": {"day": time.strftime("%Y-%m-%d"), **{name: own[name] for name in ("commit", "torch", "machine")}},
        "fingerprint": run.fingerprint(),
        "kind": run.kind,
        "size": run.size,
        "seed": run.seed,
    }


def trained_model(run: Run, folder: Path) -> tuple[nn.Module, Config]:
    """The model of a finished run as it is measured, in eval mode, and the run's configuration."""
    config = run.config(folder)
    trained = train(config, resume=True)
    return (trained.ema or trained.model).eval(), config


def compared(model: nn.Module, config: Config) -> dict:
    """Accuracy on the test typefaces, and of a sparse model how much of its FLOPs was filled."""
    found = {"test": accuracy(model, config, "test")}
    if moe_layers(model):
        (found["evaluation"],) = as_rows(evaluate(model, _loader(model, config, _images(config, "test"))))
    return found


def timed(part: str) -> dict[str, Run]:
    """Whose speed a part asks for: {label of a router, or "kind size": its first run}."""
    labelled = comparison() if part == "routers" else [(f"{run.kind} {run.size}", run) for run in sizes()]
    chosen: dict[str, Run] = {}
    for label, run in labelled:
        chosen.setdefault(label, run)
    return chosen


def known_speeds(part: str, published: Mapping[str, dict]) -> dict[str, dict]:
    """What was published of the speed of a part, if all of its runs have the settings of then; else nothing."""
    fingerprints = {label: run.fingerprint() for label, run in timed(part).items()}
    return dict(published) if {label: each["fingerprint"] for label, each in published.items()} == fingerprints else {}


def measured_speeds(part: str, folder: Path) -> dict[str, dict]:
    """What an image takes by each router, or by each kind of each size; of models as they begin.

    Args:
        part: one of SPEED.
        folder: of the runs.

    Returns:
        {label as in `timed`: what `speeds` gives, and "fingerprint", of the run}.
    """
    chosen = timed(part)
    configs = {label: run.config(folder) for label, run in chosen.items()}
    first = next(iter(configs.values()))
    images = _images(first, "val")
    made = {label: build_model(config.model, len(images.class_names)) for label, config in configs.items()}
    some = Subset(images, order(len(images))[: first.data.batch_size])
    transform = _transform(next(iter(made.values())), first)
    batches = evaluation_loader(some, transform, first.data.batch_size, 0, False)
    took = speeds(made, *next(iter(batches)))
    return {label: {"fingerprint": chosen[label].fingerprint(), **each} for label, each in took.items()}


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
    return {**told(run), "after": run.after.name, "dials": [{"dial": name, **row} for name, row in zip(names, rows)]}


def measured(model: nn.Module, config: Config, run: Run) -> dict:
    """What the test typefaces say: accuracy, few-shot transfer; of a sparse model its curves, budgets and routing.

    Both orders of claiming slots are asked for at the middle size alone; every K and all budgets of its first seed.
    """
    middle = run.size == "middle"
    whole = middle and run.seed == SEEDS[0]
    result = {"test": accuracy(model, config, "test"), "fewshot": transfer(model, config)}
    layers = moe_layers(model)
    if not layers:
        return result
    selected = next(iter(layers.values())).num_selected_experts
    selections = range(selected, 0, -1) if whole else [selected]
    settings = setting_grid(CAPACITY_FACTORS, selections, (False, True) if middle else [PRIORITY])
    result["settings"] = as_rows(evaluate(model, _loader(model, config, _images(config, "test")), settings))
    result["budgets"] = {str(share): budgeted(model, config, share) for share in (BUDGETS if whole else BUDGETS[::2])}
    result["routing"] = routed(model, config)
    return result


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
