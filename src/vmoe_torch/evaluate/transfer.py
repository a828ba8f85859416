"""Few-shot transfer: how well a linear classifier does on a frozen model's features, learned from a few images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from vmoe_torch.control import eval_mode
from vmoe_torch.data import evaluation_loader
from vmoe_torch.data.names import shown
from vmoe_torch.evaluate.ridge import best_strength, shot_accuracies, shuffled_classes
from vmoe_torch.evaluate.table import aligned
from vmoe_torch.files import csv_text, write_json, write_text

SHOTS = (1, 5, 10, 25)
STRENGTHS = tuple(2.0**power for power in range(-10, 20))


@dataclass(frozen=True)
class Task:
    """A data set to transfer to."""

    name: str
    """Name of the data set."""
    train: Dataset
    """Items (PIL image, label), of which shots are taken."""
    labels: np.ndarray
    """(N,) int64, those of `train`."""
    test: Dataset
    """Items (PIL image, label), all of which are classified."""
    num_classes: int
    """C; labels are in 0..C-1."""


@dataclass(frozen=True)
class FewShot:
    """The accuracy of one data set, number of shots and choice of images."""

    data: str
    """Name of the data set."""
    shots: int
    """Training images per class."""
    seed: int
    """Seed of the choice of images."""
    l2: float
    """Strength of the regularisation, one for all data sets and seeds."""
    accuracy: float
    """Share of the test images that were right, in 0..1."""
    test_images: int
    """Number of test images."""


def fewshot(
    model: nn.Module,
    transform: Callable,
    tasks: Sequence[Task],
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0,),
    strengths: Sequence[float] = STRENGTHS,
    batch_size: int = 128,
    workers: int = 0,
    max_broken: int = 0,
    warn: Callable[[str], None] = lambda message: None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[FewShot]:
    """The original's few-shot evaluation.

    Images whose shots are taken are the only ones of the training images that the model sees. Features are those
    before the head, behind the tanh layer where there is one.

    Args:
        model: a timm model.
        transform: PIL image -> (C, H, W), for evaluation.
        tasks: the data sets; the strength of the regularisation is the one of the best mean rank over them and seeds.
        shots: training images per class.
        seeds: of the choice of training images.
        strengths: to choose from.
        batch_size: images per forward; routing groups are formed within it.
        workers: processes that read images.
        max_broken: images of a data set that cannot be read and are left out; the next of their class take the place of
            shots.
        warn: told of each of them.
        progress: wraps the loaders, e.g. `tqdm`.

    Returns:
        A FewShot per task, number of shots and seed, in this order.

    Raises:
        ValueError: if there is no task, a number of shots is below 1, or more images than `max_broken` of a data set
            cannot be read, naming them.
    """
    if not tasks or not seeds or not strengths:
        raise ValueError("tasks, seeds and strengths must hold one at least, got none")
    if not shots or min(shots) < 1:
        raise ValueError(f"shots must be at least 1, got {tuple(shots)}")
    pin = next(model.parameters()).device.type == "cuda"

    def features(dataset: Dataset) -> tuple[Tensor, Tensor]:
        loader = evaluation_loader(
            dataset, transform, batch_size, workers, pin, max_broken=max_broken, option="max_broken"
        )
        loader.warn = warn
        return collect_features(model, progress(loader))

    accuracies, counts = [], []
    for task in tasks:
        orders = [shuffled_classes(task.labels, task.num_classes, seed) for seed in seeds]
        orders, needed, train = _shots(task.train, orders, max(shots), features)
        labels = torch.from_numpy(task.labels[needed])
        test, test_labels = features(task.test)
        counts.append(len(test_labels))
        for order in orders:
            chosen = [np.searchsorted(needed, rows[: max(shots)]) for rows in order]
            found = shot_accuracies(train, labels, chosen, test, test_labels, shots, strengths)
            accuracies.append(torch.stack(list(found)))
    best = best_strength(torch.stack(accuracies)).tolist()
    return [
        FewShot(
            task.name,
            shot,
            seed,
            strengths[best[row]],
            float(accuracies[number * len(seeds) + column][row, best[row]]),
            counts[number],
        )
        for number, task in enumerate(tasks)
        for row, shot in enumerate(shots)
        for column, seed in enumerate(seeds)
    ]


def _shots(
    dataset: Dataset, orders: list[list[np.ndarray]], most: int, features: Callable[[Dataset], tuple[Tensor, Tensor]]
) -> tuple[list[list[np.ndarray]], np.ndarray, Tensor]:
    """The orders without broken images, the (N,) numbers of the images that come first in them, and their features."""
    numbers, found = np.empty(0, np.int64), []
    while True:
        needed = np.unique(np.concatenate([rows[:most] for order in orders for rows in order]))
        missing = np.setdiff1d(needed, numbers)
        if not len(missing):
            break
        rows, kept = features(_Numbered(dataset, missing))
        found.append(rows)
        numbers = np.concatenate([numbers, missing[kept.numpy()]])
        broken = np.setdiff1d(missing, numbers)
        orders = [[rows[~np.isin(rows, broken)] for rows in order] for order in orders]
    by_number = np.argsort(numbers)
    by_number = by_number[np.isin(numbers[by_number], needed)]
    return orders, numbers[by_number], torch.cat(found)[torch.from_numpy(by_number)]


class _Numbered(Subset):
    """Some images of a data set, each with its place among them instead of its label."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[int(self.indices[index])][0], index

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        return [self[index] for index in indices]


@torch.no_grad()
def collect_features(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The features before the head, on the CPU.

    Args:
        model: a timm model; it keeps its modes. An ensemble's features are the mean over its members (the original's
            few-shot evaluation takes no ensembles).
        loader: batches of images (B, C, H, W) and labels (B,).

    Returns:
        (N, D) float32 and (N,) int64.

    Raises:
        ValueError: if there is no image, or the model has other than one vector per image.
    """
    device = next(model.parameters()).device
    features, labels = [], []
    with eval_mode(model):
        for images, numbers in loader:
            found = model.forward_head(model.forward_features(images.to(device)), pre_logits=True)
            members = getattr(model, "ensemble_size", 1)
            if members > 1 and len(found) == members * len(numbers):
                # The members of an image follow each other. Its feature is their mean, as its probabilities are.
                found = found.unflatten(0, (-1, members)).mean(1)
            if found.dim() != 2 or len(found) != len(numbers):
                raise ValueError(
                    f"features must be one vector for each of {len(numbers)} images, got shape {tuple(found.shape)}"
                )
            features.append(found.float().cpu())
            labels.append(torch.as_tensor(numbers))
    if not features:
        raise ValueError("loader must give at least one image, got none")
    return torch.cat(features), torch.cat(labels)


def format_fewshot(results: Sequence[FewShot]) -> str:
    """A plain-text table: a line per data set and number of shots, the mean over seeds and its spread."""
    lines = [("data", "shots", "accuracy %", "l2", "seeds", "test images")]
    for data, shots in dict.fromkeys((result.data, result.shots) for result in results):
        own = [result for result in results if (result.data, result.shots) == (data, shots)]
        shares = 100 * np.array([result.accuracy for result in own])
        spread = f" +- {shares.std(ddof=1):.2f}" if len(own) > 1 else ""
        number = str(own[0].test_images)
        lines.append((shown(data), str(shots), f"{shares.mean():.2f}{spread}", f"{own[0].l2:g}", str(len(own)), number))
    return "\n".join(aligned(lines))


def write_fewshot(results: Sequence[FewShot], path: Path | str) -> None:
    """Writes one row per result, as JSON if the name ends in .json, else as CSV.

    Raises:
        OSError: if the file cannot be written; then what was there still is.
    """
    rows = [asdict(result) for result in results]
    if str(path).endswith(".json"):
        write_json("table", path, rows)
    else:
        write_text("table", path, csv_text(rows, list(rows[0])))
