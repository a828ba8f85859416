"""What a model costs per image with its MoE layers set one way or another: counted FLOPs, or measured seconds."""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vmoe_torch.budget.settings import Assignment, LayerSetting, assigned
from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.evaluate import count_flops

# Forwards whose median is a latency.
REPEATS = 7


class Cost(ABC):
    """Costs per image of one batch; a subclass says how.

    Attributes:
        unit: what a cost counts.
        present: of the settings that were given as the present ones.
        layers: for each layer, the cost of every option.
    """

    unit: str

    def __init__(self, present: float, present_layers: dict[str, float], layers: dict[str, list[float]]):
        self.present = present
        self.layers = layers
        # What no setting changes.
        self.fixed = present - sum(present_layers.values())

    def predict(self, options: dict[str, int]) -> float:
        """The sum of what is fixed and of each layer's option."""
        return self.fixed + sum(self.layers[name][option] for name, option in options.items())

    @abstractmethod
    def measure(self, assignments: Sequence[Assignment]) -> list[float]:
        """The cost of the whole model at each of these settings."""


class FlopCost(Cost):
    """FLOPs as `vmoe_torch.evaluate.count_flops` has them, so a prediction is exact.

    Args:
        model: any with MoE layers.
        images: one batch.
        present: how the layers are set.
        options: settings that every layer may have.
    """

    unit = "FLOPs"

    def __init__(self, model: nn.Module, images: Tensor, present: Assignment, options: Sequence[LayerSetting]):
        self.model, self.images = model, images
        counted = self._count(present)
        every = [self._count(dict.fromkeys(present, option)).layers for option in options]
        layers = {name: [found[name] for found in every] for name in present}
        super().__init__(counted.total, counted.layers, layers)

    def _count(self, settings: Assignment):
        with assigned(self.model, settings):
            return count_flops(self.model, self.images)

    def measure(self, assignments: Sequence[Assignment]) -> list[float]:
        return [self._count(settings).total for settings in assignments]


class LatencyCost(Cost):
    """Seconds of a forward on the device of the images; a layer is timed alone, on what it gets in the model.

    Every time is taken as a share of the model's at its present settings a moment before, and the median of these
    shares counts: a machine that slows down for a while does not change them.

    Args:
        model: any with MoE layers.
        images: one batch.
        present: how the layers are set.
        options: settings that every layer may have.
    """

    unit = "seconds"

    def __init__(self, model: nn.Module, images: Tensor, present: Assignment, options: Sequence[LayerSetting]):
        self.model, self.images, self.settings = model, images, present
        layers = moe_layers(model)
        inputs = self._inputs()
        choices = [
            ({name: choice}, lambda name=name: layers[name](inputs[name]))
            for name in layers
            for choice in (present[name], *options)
        ]
        self.present, shares = self._time(choices)
        times = iter(self.present * share for share in shares)
        table = {name: [next(times) for _ in range(1 + len(options))] for name in layers}
        super().__init__(
            self.present, {name: own[0] for name, own in table.items()}, {name: own[1:] for name, own in table.items()}
        )

    def measure(self, assignments: Sequence[Assignment]) -> list[float]:
        _, shares = self._time([(settings, lambda: self.model(self.images)) for settings in assignments])
        return [self.present * share for share in shares]

    @torch.no_grad()
    def _inputs(self) -> dict[str, Tensor]:
        """What each layer gets in the model as it is set now."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            return lambda _, arguments: inputs.__setitem__(name, arguments[0])

        hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in moe_layers(self.model).items()]
        try:
            with eval_mode(self.model):
                self.model(self.images)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs

    @torch.no_grad()
    def _time(self, runs: Sequence[tuple[Assignment, Callable]]) -> tuple[float, list[float]]:
        """Seconds per image at the present settings, and each run's share of them."""
        seconds, shares = [], [[] for _ in runs]
        with eval_mode(self.model):
            # The first round warms up.
            for repeat in range(REPEATS + 1):
                whole = self._seconds(self.settings, lambda: self.model(self.images))
                times = [self._seconds(settings, run) for settings, run in runs]
                if repeat > 0:
                    seconds.append(whole / len(self.images))
                    for own, time_taken in zip(shares, times):
                        own.append(time_taken / whole)
        return statistics.median(seconds), [statistics.median(own) for own in shares]

    def _seconds(self, settings: Assignment, run: Callable) -> float:
        with assigned(self.model, settings):
            _wait(self.images.device)
            start = time.perf_counter()
            run()
            _wait(self.images.device)
            return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
