"""One run of the study: its training, and what its last weights are worth."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from benchmarks.studies.fashion_mnist import FORWARDS_PER_UPDATE
from benchmarks.studies.typefaces import specialisation
from benchmarks.studies.typefaces.fonts import scripts
from benchmarks.studies.typefaces.runs import Run, forward_flops
from vmoe_torch.budget import set_budget
from vmoe_torch.control import moe_layers, routing
from vmoe_torch.data import Typefaces, evaluation_loader
from vmoe_torch.evaluate import Task, as_rows, evaluate, fewshot, setting_grid
from vmoe_torch.train import Config, TrainResult, build_transforms, train
from vmoe_torch.weights.files import replacing

CAPACITY_FACTORS = (1.05, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
SHOTS = (1, 5, 10, 25)
BUDGETS = (0.9, 0.8)
# Images that set_budget is calibrated on, of the validation typefaces.
CALIBRATION = 2048
RESULT, ROUTING = "result.json", "routing.npz"


def execute(run: Run, folder: Path) -> dict | None:
    """Trains, or goes on, and measures the last weights; what was found stays in the run's folder.

    Returns:
        What result.json holds; None if the training was told to stop before its end.
    """
    config = run.config(folder)
    file = Path(config.run.output) / RESULT
    if file.exists():
        return json.loads(file.read_text())
    start = time.monotonic()
    trained = train(config, resume=True)
    if not trained.finished:
        return None
    seconds = time.monotonic() - start
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
        # Of this process: not of what went before, where a run was stopped.
        "training_seconds": seconds,
        "validation": accuracy(model, config, "val"),
    }
    if run.tested:
        found |= measured(model, config, trained)
    with replacing(file) as partial:
        Path(partial).write_text(json.dumps(found, indent=1) + "\n")
    return found


def measured(model: nn.Module, config: Config, trained: TrainResult) -> dict:
    """What the test typefaces say: accuracy, few-shot transfer; of a sparse model its curves, budgets and routing."""
    found = {"test": accuracy(model, config, "test"), "fewshot": transfer(model, config)}
    layers = moe_layers(model)
    if not layers:
        return found
    selected = next(iter(layers.values())).num_selected_experts
    settings = setting_grid(CAPACITY_FACTORS, range(selected, 0, -1))
    found["settings"] = as_rows(evaluate(model, _loader(model, config, _images(config, "test")), settings))
    found["budgets"] = {str(share): budgeted(model, config, share) for share in BUDGETS}
    found["routing"] = routed(model, config)
    return found


def _images(config: Config, split: str, characters=None) -> Typefaces:
    return Typefaces(config.data.root, split, characters, mode="L")


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
    images = _images(config, "val")
    some = Subset(images, order(len(images))[:CALIBRATION])
    with routing(model):
        chosen = set_budget(model, flops=share, data=_loader(model, config, some))
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
