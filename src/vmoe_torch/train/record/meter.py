"""Sums over an epoch: loss, accuracy and what the routers did."""

import torch
from torch import Tensor

from vmoe_torch.train.record.routing import LayerSample

_FIELDS = ("images", "loss", "auxiliary", "correct", "routed", "dropped", "max_load")


class Meter:
    """Sums kept on the device, so that adding to them does not wait for it.

    Args:
        device: of the sums.
        sums: those of an interrupted epoch, to go on from.
    """

    def __init__(self, device: torch.device, sums: Tensor | None = None):
        self.sums = torch.zeros(len(_FIELDS), dtype=torch.float64, device=device)
        if sums is not None:
            self.sums.copy_(sums)
        self._marked = self.sums.tolist()

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor, auxiliary: Tensor) -> None:
        """One batch: logits (B, N), labels (B,), and the 0-dim losses (means over the batch)."""
        images = labels.shape[0]
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums[0] += images
        self.sums[1] += loss.detach() * images
        self.sums[2] += auxiliary.detach().to(self.sums.device) * images
        self.sums[3] += correct

    def add_routing(self, samples: dict[str, LayerSample]) -> None:
        """What the MoE layers did in one forward."""
        for sample in samples.values():
            self.sums[4] += 1
            self.sums[5] += 0.0 if sample.dropped is None else sample.dropped
            self.sums[6] += sample.max_load

    def recent(self) -> dict[str, float]:
        """Means of loss, auxiliary and accuracy over the images since the last call."""
        sums = self.sums.tolist()
        images, loss, auxiliary, correct = (now - before for now, before in zip(sums[:4], self._marked))
        self._marked = sums
        images = max(images, 1.0)
        return {"loss": loss / images, "auxiliary": auxiliary / images, "accuracy": correct / images}

    def results(self, sums: Tensor | None = None) -> dict[str, float | None]:
        """Means: loss, auxiliary, accuracy; and over the sampled MoE layers, dropped and max_load, or None.

        dropped is the share of choices dropped; max_load the busiest expert's share of the kept choices, where 1 is a
        perfectly balanced one.
        """
        values = dict(zip(_FIELDS, (self.sums if sums is None else sums).tolist()))
        images, routed = max(values["images"], 1.0), values["routed"]
        return {
            "loss": values["loss"] / images,
            "auxiliary": values["auxiliary"] / images,
            "accuracy": values["correct"] / images,
            "dropped": values["dropped"] / routed if routed else None,
            "max_load": values["max_load"] / routed if routed else None,
        }
