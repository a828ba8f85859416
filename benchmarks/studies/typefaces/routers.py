"""The routers and layouts of experts that the study compares, and what a step of each takes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.protocol import Samples, measure, one_update
from benchmarks.harness.saved import count_saved
from vmoe_torch.train import create_muon

# Of all models but the study's own: experts as wide as the MLP they replace, or on average.
NUM_EXPERTS = 16
WHOLE = {"num_experts": NUM_EXPERTS, "expert_hidden": None, "renormalize_gates": False}
# Of experts of several sizes.
SIZE_LOSS = 0.01
# Whose dials are turned after the training.
DIALLED = ("top experts, K=2", "top experts, K=1")
# Seconds for the steps of all models, and again for their inference.
SECONDS = 90.0


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """{label: kind of run, and what a model has that the sparse one of the study may not have}."""
    usual = {**WHOLE, "capacity_factor": 1.05, "capacity_multiple_of": 1}
    one, two = ({**usual, "num_selected_experts": selected} for selected in (1, 2))
    half, quarter = NUM_EXPERTS // 2, NUM_EXPERTS // 4
    return {
        "dense": ("dense", {}),
        "top experts, K=1": ("sparse", one),
        "top experts, K=2": ("sparse", two),
        "threshold, mean 1.0": ("sparse", {**two, "router": "threshold", "mean_selected_experts": 1.0}),
        "threshold, mean 1.5": ("sparse", {**two, "router": "threshold", "mean_selected_experts": 1.5}),
        "dropless, K=1": ("sparse", {**WHOLE, "num_selected_experts": 1}),
        # The study's own.
        "dropless, K=2 of 32 half as wide": ("sparse", {}),
        # As the original has it: groups of an image.
        "expert choice": (
            "sparse",
            {**one, "router": "expert_choice", "capacity_factor": 1.0, "group_size": "image"},
        ),
        # A soft router wants K and the capacity left out.
        "soft": ("sparse", {**two, "router": "soft", "group_size": "image"}),
        # On average as wide as the others.
        "several sizes, equal parameters": (
            "sparse",
            {**one, "expert_hidden": (1.5,) * half + (0.5,) * half, "size_loss_weight": SIZE_LOSS},
        ),
        # Half as wide on average, and twice as many for a token.
        "several sizes, equal active FLOPs": (
            "sparse",
            {
                **two,
                "expert_hidden": (1.0,) * quarter + (0.5,) * half + (0.0,) * quarter,
                "size_loss_weight": SIZE_LOSS,
            },
        ),
    }


def speeds(made: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """What one thread needs for an image, all models in turn; to be called on a machine that does nothing else.

    Args:
        made: trained models by label; they stay as they are.
        images: (B, C, H, W), of a training batch.
        labels: (B,).

    Returns:
        {label: {"step" | "inference": [median, 20 % and 80 % quantile] in seconds per image, "kept": bytes per image
        that autograd keeps for the backward}}.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = {label: copy.deepcopy(model).train() for label, model in made.items()}
        kept = {label: _kept(model, images, labels) for label, model in training.items()}
        steps = {label: _step(model, images, labels) for label, model in training.items()}
        calls = {label: _inference(copy.deepcopy(model).eval(), images) for label, model in made.items()}
        cpu = torch.device("cpu")
        step, inference = measure(steps, cpu, SECONDS), measure(calls, cpu, SECONDS)
    finally:
        torch.set_num_threads(threads)
    return {
        label: {
            "step": _per_image(step[label], len(images)),
            "inference": _per_image(inference[label], len(images)),
            "kept": kept[label] / len(images),
        }
        for label in made
    }


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    # As the study trains, but for the weights, which stay.
    return one_update(lambda: F.cross_entropy(model(images), labels), create_muon(model, lr=0.0))


def _inference(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model(images))


def _kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    def loss(weights: list[Tensor]) -> Tensor:
        weights += model.parameters()
        return F.cross_entropy(model(images), labels)

    return count_saved(loss)


def _per_image(samples: Samples, images: int) -> list[float]:
    return [seconds / images for seconds in (samples.median, samples.quantile(0.2), samples.quantile(0.8))]
