"""Accuracy of one set of weights at many routing settings, in one pass over the data."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_torch.control import eval_mode, moe_layers, routing
from vmoe_torch.evaluate.flops import Flops, count_flops
from vmoe_torch.evaluate.prefix import shared_forward
from vmoe_torch.evaluate.settings import RoutingSetting
from vmoe_torch.layers.calibration import Images


@dataclass(frozen=True)
class Evaluation:
    """What a model reached at one routing setting."""

    setting: RoutingSetting
    """What was asked for."""
    images: int
    """Number of images, or of videos."""
    top1: float
    """Share of images whose label scored highest, in 0..1."""
    top5: float
    """Share of images whose label was among the five highest (all, with fewer classes)."""
    loss: float
    """Mean cross-entropy, in nats."""
    capacity_factor: float
    """Slots there were, over choices made: the asked one after the rounding of the capacity; NaN for a dense model."""
    dropped: float
    """Share of choices that found their expert full, in 0..1."""
    unprocessed: float
    """Share of tokens that no expert processed, in 0..1."""
    flops: Flops
    """FLOPs per image of the first batch; of a video, those of all its views."""
    selected: float = math.nan
    """Choices per token, above the threshold where there is one, on average; NaN for a dense model."""
    filled_flops: float = math.nan
    """FLOPs per image, of all images, if slots without a token cost nothing."""


class _Sums:
    """Running sums of one setting over the batches."""

    def __init__(self) -> None:
        self.images = self.top1 = self.top5 = self.slots = self.choices = self.dropped = 0
        self.tokens = self.unprocessed = 0
        self.loss = 0.0
        # FLOPs of filled slots: of the first batch per image, and of all.
        self.first_filled, self.filled = 0.0, 0

    def add(self, model: nn.Module, logits: Tensor, labels: Tensor) -> None:
        logits = _averaged(logits.float(), len(labels))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        layers = moe_layers(model).values()
        filled = sum(layer.filled_flops() for layer in layers)
        if self.images == 0:
            self.first_filled = filled / len(labels)
        self.filled += filled
        self.images += len(labels)
        for layer in layers:
            slots = layer.record.slots
            self.slots += layer.record.num_slots(layer.num_experts)
            if layer.record.experts is None:
                # Who is not asked is not dropped: as if every token had wanted one expert.
                self.choices += len(slots)
            else:
                selected = layer.record.selected
                choices = slots.numel() if selected is None else int(selected.sum())
                self.choices += choices
                self.dropped += choices - int((slots >= 0).sum())
            self.tokens += len(slots)
            self.unprocessed += int((slots < 0).all(1).sum())

    def result(self, setting: RoutingSetting, flops: Flops) -> Evaluation:
        return Evaluation(
            setting,
            self.images,
            self.top1 / self.images,
            self.top5 / self.images,
            self.loss / self.images,
            self.slots / self.choices if self.choices else math.nan,
            self.dropped / max(self.choices, 1),
            self.unprocessed / max(self.tokens, 1),
            flops,
            self.choices / self.tokens if self.tokens else math.nan,
            flops.filled + (self.filled / self.images - self.first_filled),
        )


def _averaged(logits: Tensor, items: int) -> Tensor:
    """Of the logits of all views of each item, the logarithm of the mean of their probabilities; one view's stay."""
    if len(logits) == items:
        return logits
    return logits.unflatten(0, (items, -1)).log_softmax(2).logsumexp(1) - math.log(len(logits) / items)


class _Routing:
    """The routing of a setting, with the thresholds that its mean needs, to be set again and again."""

    def __init__(self, model: nn.Module, setting: RoutingSetting, calibration: Images | None):
        self.model, self.states = model, {}
        changes = setting.changes()
        if not changes:
            # A dense model has none to change.
            return
        data = calibration if setting.mean_selected_experts is not None and setting.gate_threshold is None else None
        with routing(model, data=data, **changes):
            self.states = {name: layer.routing_state() for name, layer in moe_layers(model).items()}

    @contextmanager
    def set(self) -> Iterator[None]:
        """For the length of a `with` block."""
        with routing(self.model) if self.states else nullcontext():
            for name, layer in moe_layers(self.model).items():
                if name in self.states:
                    layer.restore_routing(self.states[name])
            yield


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    settings: Sequence[RoutingSetting] = (RoutingSetting(),),
    *,
    calibration: Images | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Evaluation]:
    """Evaluates a classifier at every routing setting, reading the data once.

    What no setting changes, the blocks before the first MoE layer, runs once per batch too.

    A dropped token depends on its group, so results depend on the order of the data and on the batch size where it is
    no multiple of the group size.

    Args:
        model: a classifier with choices per token in its MoE layers, if any; it keeps its routing and its modes.
        loader: batches of images (B, C, H, W), of clips (B, C, T, H, W), or of several views of videos
            (B, V, C, T, H, W), over which probabilities are averaged, and labels (B,) int64.
        settings: what to evaluate.
        calibration: images to find the thresholds on of settings with mean_selected_experts, as `set_routing` takes
            them; a model trained by threshold needs none.
        progress: wraps the loader, e.g. `tqdm`.

    Returns:
        One Evaluation per setting, in their order.

    Raises:
        ValueError: if there is no setting or no image, or a setting does not suit the model.
    """
    if not settings:
        raise ValueError("settings must hold at least one RoutingSetting, got none")
    routings = [_Routing(model, setting, calibration) for setting in settings]
    device = next(model.parameters()).device
    sums = [_Sums() for _ in settings]
    flops: list[Flops] = []
    with eval_mode(model):
        for images, labels in progress(loader):
            images, labels = images.to(device), labels.to(device)
            if len(images) == 0:
                continue
            views = images.shape[1] if images.ndim == 6 else 1
            images = images.flatten(0, 1) if images.ndim == 6 else images
            if not flops:
                for each in routings:
                    with each.set():
                        flops.append(count_flops(model, images).times(views))
            forward = shared_forward(model, images)
            for each, running in zip(routings, sums):
                with each.set():
                    running.add(model, forward(), labels)
    if not flops:
        raise ValueError("loader must give at least one image, got none")
    return [running.result(setting, count) for setting, running, count in zip(settings, sums, flops)]
