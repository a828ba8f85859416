"""How well a model does on a small set of images at one setting of its layers or another."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_torch.budget.settings import Assignment, LayerSetting, assigned
from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.evaluate.prefix import layer_forward, shared_forward


class Quality:
    """Loss and accuracy over a calibration set that is kept in memory.

    With labels the loss is the cross-entropy. Without, it is the divergence KL(present || other) of the predictions
    from those of the present settings, and accuracy the share of images whose best class is the same.

    Args:
        model: a classifier.
        data: batches (images, labels), or images only, or one tensor of images.
        present: how the layers are set.

    Attributes:
        batches: (images (B, C, H, W), targets): labels (B,), or log-probabilities (B, N) at the present settings.
        images: number of images.
        labelled: whether there are labels.

    Raises:
        ValueError: if there is no image, or only some batches have labels.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, data: Tensor | Iterable, present: Assignment):
        self.model = model
        device = next(model.parameters()).device
        batches = [data] if isinstance(data, Tensor) else data
        read = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in batches]
        read = [tuple(torch.as_tensor(part).to(device) for part in batch[:2]) for batch in read if len(batch[0])]
        if not read:
            raise ValueError("data must give at least one image, got none")
        if len({len(batch) for batch in read}) > 1:
            raise ValueError("data must give labels with every batch or with none, got both")
        self.labelled = len(read[0]) == 2
        if not self.labelled:
            with eval_mode(model), assigned(model, present):
                read = [(images, model(images).float().log_softmax(-1)) for (images,) in read]
        self.batches: list[tuple[Tensor, Tensor]] = read
        self.images = sum(len(images) for images, _ in self.batches)

    @torch.no_grad()
    def of(self, assignments: Sequence[Assignment]) -> list[tuple[float, float]]:
        """(loss, accuracy) of each of these settings, what comes before the first MoE layer once for all."""
        sums = torch.zeros(len(assignments), 2, dtype=torch.float64)
        with eval_mode(self.model):
            for images, targets in self.batches:
                forward = shared_forward(self.model, images)
                for settings, own in zip(assignments, sums):
                    with assigned(self.model, settings):
                        own += self._sums(forward(), targets)
        return [(loss, accuracy) for loss, accuracy in (sums / self.images).tolist()]

    @torch.no_grad()
    def sensitivities(
        self,
        centre: Assignment,
        options: Sequence[LayerSetting],
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> tuple[float, dict[str, list[float]]]:
        """The loss at a centre, and for each layer what every option of this layer alone adds to it."""
        layers = moe_layers(self.model)
        base = 0.0
        added = {name: torch.zeros(len(options), dtype=torch.float64) for name in layers}
        with eval_mode(self.model), assigned(self.model, centre):
            for images, targets in progress(self.batches):
                logits, forward = layer_forward(self.model, images)
                base += float(self._sums(logits, targets)[0])
                for name, layer in layers.items():
                    for number, option in enumerate(options):
                        with assigned(self.model, {name: option}):
                            added[name][number] += self._sums(forward(layer), targets)[0]
        return base / self.images, {
            name: [(value - base) / self.images for value in sums.tolist()] for name, sums in added.items()
        }

    def _sums(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(2,) float64 on the CPU: summed loss, and number of right ones."""
        log_p = logits.float().log_softmax(-1)
        if self.labelled:
            loss, right = F.nll_loss(log_p, targets, reduction="sum"), log_p.argmax(-1) == targets
        else:
            loss = F.kl_div(log_p, targets, reduction="sum", log_target=True)
            right = log_p.argmax(-1) == targets.argmax(-1)
        return torch.stack([loss.double(), right.sum().double()]).cpu()
