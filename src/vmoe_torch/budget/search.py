"""`set_budget`: K and capacity of each MoE layer for a budget of FLOPs or time.

Each layer is tried alone at every option: what it then adds to the loss, and what it costs. Taken as independent of
each other, these numbers give the best choice for the budget exactly (`knapsack`). Losses do not quite add up, so the
choice is verified on the whole model, next to every setting that is the same in all layers, and the best one that keeps
the budget wins; a second round starts from that one. The result is thus never worse on the calibration images than the
best single (K, capacity).
"""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from vmoe_torch.budget.cost import Cost, FlopCost, LatencyCost
from vmoe_torch.budget.knapsack import choose
from vmoe_torch.budget.quality import Quality
from vmoe_torch.budget.result import Budget, Candidate
from vmoe_torch.budget.settings import Assignment, LayerSetting, assign, current_settings, default_settings, fitted
from vmoe_torch.control import moe_layers

# A choice that turns out slower than predicted is made again for less time, so often.
TRIES = 4


def set_budget(
    model: nn.Module,
    *,
    flops: float | None = None,
    latency: float | None = None,
    data: Tensor | Iterable[tuple[Tensor, Tensor] | Tensor],
    settings: Sequence[LayerSetting] | None = None,
    rounds: int = 2,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Budget:
    """Chooses K and capacity of each MoE layer for a budget, and leaves the model set so.

    Set are num_selected_experts, eval_capacity_factor and batch_priority, and the mean number of experts per token with
    its threshold, where that is among the settings. `Budget.revert(model)` takes them back, and so does the end of
    `with vmoe_torch.routing(model):` around the call.

    Args:
        model: a classifier that gives logits (or log-probabilities), its MoE layers routed by top experts or threshold.
        flops: the budget, as a share of the FLOPs per image that the model has as it is set now, in eval mode and on
            the first batch: 0.8 is a fifth less. As `vmoe_torch.evaluate.count_flops` counts.
        latency: instead, a share of the time of a forward of the first batch, measured on the model's device now.
        data: calibration set, some hundred images: batches (images (B, C, H, W), labels (B,)), or images only, or one
            tensor of images. Read once and kept. B should be a whole number of routing groups and, above all for a
            latency, as in use.
        settings: what each layer may be set to; None is every K up to the present one, at capacity factors from the
            present one down to 0.1, with Batch Priority Routing; for a model that is set to a mean with the thresholds
            of its training also smaller means.
        rounds: how often to take the layers one by one; each costs about as many forwards of the calibration set as
            there are settings, times half the number of MoE layers.
        progress: wraps the batches of each round, e.g. `tqdm`.

    Returns:
        Budget; print it.

    Raises:
        ValueError: if not one budget is given, it is below what the cheapest settings cost or above the present cost
            (where no settings are given), there is no image, or the model is not of this kind.
    """
    if (flops is None) == (latency is None):
        raise ValueError(f"one of flops and latency must be given, got flops={flops} and latency={latency}")
    share = flops if latency is None else latency
    name = "flops" if latency is None else "latency"
    if not (isinstance(share, numbers.Real) and 0 < share < math.inf):
        raise ValueError(f"{name} must be above 0, got {share!r}")
    # Settings of one's own may cost more than the present ones.
    if settings is None and flops is not None and flops > 1:
        raise ValueError(f"flops must be a share of the present cost, at most 1 as 0.8 is, got {flops}")
    if not isinstance(rounds, numbers.Integral):
        raise ValueError(f"rounds must be a whole number, got {rounds!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for layer_name, layer in moe_layers(model).items():
        if layer.router_type not in ("top_experts", "threshold"):
            raise ValueError(f"layers must route by top_experts or threshold, got {layer.router_type} in {layer_name}")
    present = current_settings(model)
    if not present:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    options = default_settings(present) if settings is None else list(dict.fromkeys(settings))
    if not options:
        raise ValueError("settings must hold at least one LayerSetting, got none")
    quality = Quality(model, data, present)
    cost = (FlopCost if latency is None else LatencyCost)(model, quality.batches[0][0], present, options)
    search = _Search(model, quality, cost, present, options, share * cost.present, progress)
    if search.best is None:
        # Rounded up, so that it can be asked for.
        least = math.ceil(1e4 * min(each.cost for each in search.candidates) / cost.present) / 1e4
        raise ValueError(f"{name} must be at least {least:.4f}, the share of the cheapest setting, got {share}")
    for number in range(1, rounds + 1):
        search.improve(number)
    assign(model, search.best.settings)
    return Budget(
        cost.unit,
        search.limit,
        share,
        quality.images,
        quality.labelled,
        search.candidates[0],
        search.best,
        tuple(search.candidates),
    )


class _Search:
    """The candidates so far; begins with the present settings and all those that are the same in every layer."""

    def __init__(
        self,
        model: nn.Module,
        quality: Quality,
        cost: Cost,
        present: Assignment,
        options: Sequence[LayerSetting],
        limit: float,
        progress: Callable[[Iterable], Iterable],
    ):
        self.model, self.quality, self.cost, self.options, self.limit = model, quality, cost, options, limit
        self.progress = progress
        self.base, self.added = quality.sensitivities(present, options, progress)
        self.candidates: list[Candidate] = []
        self._verify([("present", present, cost.present, self.base)])
        self._verify(
            [
                (f"all layers {option}", *self._predicted(dict.fromkeys(present, number)))
                for number, option in enumerate(options)
            ]
        )

    @property
    def best(self) -> Candidate | None:
        """The least loss within the budget, of equal ones the cheapest."""
        within = [each for each in self.candidates if each.cost <= self.limit]
        return min(within, key=lambda each: (each.loss, each.cost), default=None)

    def improve(self, number: int) -> None:
        """Takes the layers one by one, and verifies the choice that this suggests."""
        if number > 1:
            self.base, self.added = self.quality.sensitivities(self.best.settings, self.options, self.progress)
        limit = self.limit
        for _ in range(TRIES):
            chosen = choose(
                [np.array(costs) for costs in self.cost.layers.values()],
                [np.array(losses) for losses in self.added.values()],
                limit - self.cost.fixed,
            )
            if chosen is None:
                return
            predicted = self._predicted(dict(zip(self.cost.layers, chosen)))
            found = next((each for each in self.candidates if each.settings == predicted[0]), None)
            if found is None:
                (found,) = self._verify([(f"per layer, round {number}", *predicted)])
            if found.cost <= self.limit:
                return
            limit *= self.limit / found.cost

    def _predicted(self, options: dict[str, int]) -> tuple[Assignment, float, float]:
        settings = fitted(self.model, {name: self.options[option] for name, option in options.items()})
        loss = self.base + sum(self.added[name][option] for name, option in options.items())
        return settings, self.cost.predict(options), loss

    def _verify(self, suggested: Sequence[tuple[str, Assignment, float, float]]) -> list[Candidate]:
        """Measures (name, settings, predicted cost, predicted loss) on the whole model."""
        settings = [each[1] for each in suggested]
        costs, qualities = self.cost.measure(settings), self.quality.of(settings)
        found = [
            Candidate(name, assignment, predicted_cost, cost, predicted_loss, loss, top1)
            for (name, assignment, predicted_cost, predicted_loss), cost, (loss, top1) in zip(
                suggested, costs, qualities
            )
        ]
        self.candidates += found
        return found
