"""Batches in an order, and with an augmentation, that only the seed, the epoch and the image decide.

An update at any place of an epoch can so be had again: from a checkpoint, with other numbers of workers or processes.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class EpochSampler:
    """Batches of (epoch, image number) keys for one process.

    An epoch is a permutation of the images, cut into updates of `batch_size` images; what does not fill the last update
    is left out. An update is cut into accumulation steps and those into the processes' batches, all contiguous, so the
    images of an update do not depend on how it is cut.

    Args:
        num_images: images in the data set.
        batch_size: images per update, over all processes and accumulation steps.
        seed: of the permutations.
        accumulation: batches per update and process.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: if batch_size is not a multiple of accumulation times processes, or above num_images.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, accumulation: int = 1, rank: int = 0, world_size: int = 1
    ):
        if batch_size < 1 or batch_size % (accumulation * world_size):
            raise ValueError(
                f"batch_size must be a positive multiple of accumulation * processes = {accumulation * world_size}, "
                f"got {batch_size}"
            )
        if batch_size > num_images:
            raise ValueError(f"batch_size must be at most the {num_images} images of the data set, got {batch_size}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.updates_per_epoch = num_images // batch_size
        self._epoch = 0
        self._first_update = 0

    def set_position(self, epoch: int, update: int) -> None:
        """The next iteration begins at this update of this epoch."""
        self._epoch, self._first_update = epoch, update

    def __len__(self) -> int:
        return (self.updates_per_epoch - self._first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.num_images)
        size = self.batch_size // (self.accumulation * self.world_size)
        for update in range(self._first_update, self.updates_per_epoch):
            images = order[update * self.batch_size : (update + 1) * self.batch_size]
            for part in images.reshape(self.accumulation, self.world_size, size)[:, self.rank]:
                yield [(epoch, int(image)) for image in part]


class SeededDataset(Dataset):
    """Applies a random transform whose draws depend on the seed and the (epoch, image) key alone.

    timm's transforms draw from Python's, numpy's and torch's global generators: these are seeded per image and put back
    afterwards, so in one process the model's own draws are not disturbed.
    """

    def __init__(self, dataset: Dataset, transform, seed: int):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._item(*key) for key in keys]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _item(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        seed = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        image, label = self.dataset[index]
        return self.transform(image), label


class TransformedDataset(Dataset):
    """Applies a transform without randomness."""

    def __init__(self, dataset: Dataset, transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def training_loader(dataset: Dataset, transform, sampler: EpochSampler, workers: int, pin_memory: bool) -> DataLoader:
    """Batches (images, labels) in the sampler's order; each iteration runs from the sampler's position to the end."""
    return DataLoader(
        SeededDataset(dataset, transform, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        # Its base seed would otherwise be drawn from the generator that the model's noise uses.
        generator=torch.Generator().manual_seed(sampler.seed),
    )


def evaluation_loader(
    dataset: Dataset, transform, batch_size: int, workers: int, pin_memory: bool, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Batches (images, labels) in the order of the data set; each process has its own contiguous share."""
    first, last = (len(dataset) * part // world_size for part in (rank, rank + 1))
    return DataLoader(
        TransformedDataset(dataset, transform),
        sampler=range(first, last),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
