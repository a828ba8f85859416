"""What the routers are worth: accuracy with their choices replaced by random ones, layer by layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_torch.analyze.statistics import routed_layers
from vmoe_torch.control import eval_mode
from vmoe_torch.evaluate.prefix import shared_forward


@dataclass(frozen=True)
class Ablation:
    """What a model reached with some of its routers replaced."""

    layers: tuple[str, ...]
    """Names of the layers with random choices; none is the model as it is."""
    images: int
    """Number of images."""
    top1: float
    """Share of images whose label scored highest, in 0..1."""
    loss: float
    """Mean cross-entropy, in nats."""


class _RandomChoices:
    """K different experts for every token, each set of K as likely as any other."""

    def __init__(self, num_experts: int, generator: torch.Generator):
        self.num_experts = num_experts
        self.generator = generator

    def __call__(self, experts: Tensor) -> Tensor:
        # Drawn on the CPU, so that every device gets the same.
        draws = torch.rand(len(experts), self.num_experts, generator=self.generator)
        return draws.topk(experts.shape[1]).indices.to(experts)


@contextmanager
def random_routers(model: nn.Module, layers: Sequence[str] | None = None, seed: int = 0) -> Iterator[nn.Module]:
    """Random choices instead of the router's for the length of a `with` block; weights are not touched.

    Every token goes to K experts drawn uniformly. The gates stay: its first choice keeps the weight that the router
    gave the best expert, and its place in the order of BPR.

    Args:
        model: any module with top-experts MoE layers.
        layers: names of the layers; None is all.
        seed: of the draws.

    Raises:
        ValueError: if the model has no such layer.
    """
    found = routed_layers(model)
    unknown = sorted(set(layers or ()) - set(found))
    if unknown:
        raise ValueError(f"layers must be among {', '.join(found)}, got {', '.join(unknown)}")
    chosen = [found[name] for name in (found if layers is None else layers)]
    generator = torch.Generator().manual_seed(seed)
    before = [layer.own_router().choices for layer in chosen]
    try:
        for layer in chosen:
            layer.own_router().choices = _RandomChoices(layer.num_experts, generator)
        yield model
    finally:
        for layer, choices in zip(chosen, before):
            layer.own_router().choices = choices


@torch.no_grad()
def ablate_routers(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Ablation]:
    """Evaluates a classifier as it is, with each layer's router replaced by random choices, and with all replaced.

    Args:
        model: a classifier with top-experts MoE layers, at the routing that is set; it is run in eval mode.
        loader: batches of images (B, C, H, W) and labels (B,) int64.
        seed: of the random choices.
        progress: wraps the loader, e.g. `tqdm`.

    Returns:
        The model as it is, one for each layer in their order, and, of several layers, one for all together.

    Raises:
        ValueError: if the model has no such layer, or there is no image.
    """
    names = tuple(routed_layers(model))
    variants = [(), *((name,) for name in names)] + ([names] if len(names) > 1 else [])
    device = next(model.parameters()).device
    images_seen, right, loss = 0, [0] * len(variants), [0.0] * len(variants)
    with eval_mode(model):
        for batch, (images, labels) in enumerate(progress(loader)):
            if len(images) == 0:
                continue
            images, labels = images.to(device), labels.to(device)
            images_seen += len(images)
            forward = shared_forward(model, images)
            for number, layers in enumerate(variants):
                with random_routers(model, layers, seed + batch):
                    logits = forward().float()
                right[number] += int((logits.argmax(1) == labels).sum())
                loss[number] += float(F.cross_entropy(logits, labels, reduction="sum"))
    if images_seen == 0:
        raise ValueError("loader must give at least one image, got none")
    return [
        Ablation(layers, images_seen, count / images_seen, total / images_seen)
        for layers, count, total in zip(variants, right, loss)
    ]
