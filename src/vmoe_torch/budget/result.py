"""What was tried for a budget, what was chosen, and its tables."""

import dataclasses
from dataclasses import dataclass

from torch import nn

from vmoe_torch.budget.settings import Assignment, assign
from vmoe_torch.control import capacity_text
from vmoe_torch.evaluate.table import aligned


@dataclass(frozen=True)
class Candidate:
    """One setting of all layers."""

    name: str
    """As "present", "all layers K=2 C=0.5 BPR" or "per layer, round 1"."""
    settings: Assignment
    """Setting of each layer, by name."""
    predicted_cost: float
    """Cost per image, in the unit of the budget."""
    cost: float
    """The same, counted or timed on the whole model."""
    predicted_loss: float
    """Loss, from what each layer's setting alone added to the loss."""
    loss: float
    """Mean loss on the calibration images, in nats."""
    top1: float
    """Share of the calibration images that were right, in 0..1."""

    @property
    def alike(self) -> bool:
        """Whether all layers have the same setting."""
        return len(set(self.settings.values())) == 1


@dataclass(frozen=True)
class Budget:
    """What `set_budget` chose, and from what."""

    unit: str
    """Either "FLOPs" or "seconds", per image."""
    limit: float
    """The budget in this unit."""
    share: float
    """The budget as it was asked for, as a share of the present cost."""
    images: int
    """Number of calibration images."""
    labelled: bool
    """Whether they had labels. If not, `top1` is the agreement with the model as it was, and `loss` the divergence from
    its predictions."""
    present: Candidate
    """The model as it was."""
    chosen: Candidate
    """What is set now."""
    candidates: tuple[Candidate, ...]
    """Everything that was verified on the whole model, the present settings first."""

    def best_global(self) -> Candidate | None:
        """Of the candidates within the budget that set all layers alike, that of the least loss."""
        alike = [each for each in self.candidates if each.alike and each.cost <= self.limit]
        return min(alike, key=lambda each: each.loss, default=None)

    def apply(self, model: nn.Module) -> None:
        """Sets the layers of a model, this one or another of the same names, as chosen."""
        assign(model, self.chosen.settings)

    def revert(self, model: nn.Module) -> None:
        """Sets the layers as they were before."""
        assign(model, self.present.settings)

    def as_dict(self) -> dict:
        """All of it in plain values, for JSON."""
        return dataclasses.asdict(self, dict_factory=_without_thresholds)

    def __str__(self) -> str:
        scale, unit = (1e-6, "MFLOPs") if self.unit == "FLOPs" else (1e3, "ms")
        loss, top1 = ("loss", "top-1 %") if self.labelled else ("divergence", "agreement %")
        by_mean = any(setting.mean_selected_experts is not None for setting in self.chosen.settings.values())
        layers = [("layer", "K", "capacity", "order") + ("mean",) * by_mean]
        for name, setting in self.chosen.settings.items():
            order = "BPR" if setting.batch_priority else "vanilla"
            cells = (name, str(setting.num_selected_experts), capacity_text(setting.eval_capacity_factor), order)
            layers.append(cells + (setting.mean,) * by_mean)
        rows = [("", unit, "predicted", "% of present", loss, "predicted", top1)]
        shown = {"present": self.present, "best alike": self.best_global(), "chosen": self.chosen}
        for role, each in shown.items():
            if each is not None:
                rows.append(
                    (
                        f"{role} ({each.name})" if each.name != role else role,
                        f"{scale * each.cost:.3f}",
                        f"{scale * each.predicted_cost:.3f}",
                        f"{100 * each.cost / self.present.cost:.1f}",
                        f"{each.loss:.4f}",
                        f"{each.predicted_loss:.4f}",
                        f"{100 * each.top1:.2f}",
                    )
                )
        return "\n".join(
            [
                f"budget: {scale * self.limit:.3f} {unit} per image, {self.share:g} of the present cost; "
                f"{self.images} calibration images, {len(self.candidates)} candidates verified",
                "",
                *aligned(layers, left=1),
                "",
                *aligned(rows, left=1),
            ]
        )


def _without_thresholds(fields: list[tuple[str, object]]) -> dict[str, object]:
    """A dataclass as a dict; no mean and no threshold are not mentioned."""
    unsaid = ("mean_selected_experts", "gate_threshold")
    return {name: value for name, value in fields if value is not None or name not in unsaid}
