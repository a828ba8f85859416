"""The original's mixup: every image mixed with the ones after it, in shares that one Dirichlet draw decides."""

import numpy as np
import torch
from timm.data.mixup import one_hot
from torch import Tensor


class DirichletMixup:
    """Mixes a batch with itself rolled, the image of the place itself counting most.

    timm's mixes pairs of a batch and its reverse by a Beta draw.

    Args:
        concentration: of the symmetric Dirichlet distribution; the lower, the closer to no mixing.
        num_classes: N.
        label_smoothing: of the one-hot targets, before they are mixed.
        size: images that are mixed into one.
    """

    def __init__(self, concentration: float, num_classes: int, label_smoothing: float = 0.0, size: int = 2):
        self.concentration = concentration
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.size = size

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) to mixed images and targets (B, N); draws from numpy's generator."""
        off = self.label_smoothing / self.num_classes
        targets = one_hot(labels, self.num_classes, on_value=1 - self.label_smoothing + off, off_value=off)
        shares = np.random.dirichlet([self.concentration] * self.size)
        return mix(images, shares), mix(targets, shares)


def mix(batch: Tensor, shares: np.ndarray) -> Tensor:
    """Weighted sum of a batch (B, ...) rolled by 0, 1, ... places, the largest share first."""
    shares = np.sort(shares)[::-1]
    mixed = torch.zeros_like(batch)
    for shift, share in enumerate(shares.tolist()):
        mixed.add_(batch.roll(-shift, 0), alpha=share)
    return mixed
