"""Some images of a data set."""

import torch
from torch.utils.data import Dataset, Subset


def sample(dataset: Dataset, images: int | None, seed: int = 0) -> Subset:
    """Images of a data set in random order: groups share slots, and should show different classes.

    Args:
        dataset: with numbered items.
        images: how many, at most; None is all.
        seed: of the order.

    Raises:
        ValueError: if `images` is below 1, or the data set has none.
    """
    if images is not None and images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got none")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:images].tolist())
