"""Batches in an order, and with an augmentation, that only the seed, the epoch and the image decide.

So the images of any update can be loaded again: from a checkpoint, with other numbers of workers or processes.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vmoe_torch.data.image import BrokenImageError

# A label that no loss and no accuracy counts.
NO_LABEL = -100
# Broken images in a row, after which a data set is given up.
MOST_BROKEN_IN_A_ROW = 100
# Broken images that an error names at most.
MOST_NAMED = 100


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


def read_item(
    dataset: Dataset, index: int, seed: tuple[int, ...], transform: Callable[[Any], Tensor]
) -> tuple[Tensor, int, list[str]]:
    """An item (image, label) of a data set, or in place of a broken one another, which the seed decides.

    Args:
        dataset: items (image, label).
        index: which of them.
        seed: decides what takes the place of a broken one.
        transform: image -> tensor. Videos are read here, so it may find that one is broken.

    Returns:
        (tensor, label, messages that name the broken images).

    Raises:
        BrokenImageError: if 100 images in a row are broken, naming them.
    """
    broken: list[str] = []
    while True:
        try:
            image, label = dataset[index]
            return transform(image), label, broken
        except BrokenImageError as error:
            broken.append(str(error))
            if len(broken) == MOST_BROKEN_IN_A_ROW:
                # Of few images some come again.
                raise BrokenImageError("; ".join(dict.fromkeys(broken))) from None
            index = int(np.random.default_rng((*seed, index, len(broken))).integers(len(dataset)))


class SeededDataset(Dataset):
    """Applies a random transform whose draws depend on the seed and the (epoch, image) key alone.

    An item is (image, label, messages about the broken images in whose place it came). timm's transforms draw from
    Python's, numpy's and torch's global generators: these are seeded per image and put back afterwards, so in one
    process the model's own draws are not disturbed.
    """

    def __init__(self, dataset: Dataset, transform, seed: int):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int, list[str]]]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._item(*key) for key in keys]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _item(self, epoch: int, index: int) -> tuple[Tensor, int, list[str]]:
        seed = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        return read_item(self.dataset, index, (self.seed, epoch), self.transform)


class TransformedDataset(Dataset):
    """Applies a transform without randomness."""

    def __init__(self, dataset: Dataset, transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


class TolerantDataset(TransformedDataset):
    """The same, but in place of a broken image comes another with the label NO_LABEL, and messages come third."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[str]]:
        image, label, broken = read_item(self.dataset, index, (), self.transform)
        return image, NO_LABEL if broken else label, broken


class SkippingDataset(TransformedDataset):
    """The same, but an item with a broken image is None and NO_LABEL, and messages come third."""

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, list[str]]:
        try:
            return *super().__getitem__(index), []
        except BrokenImageError as error:
            return None, NO_LABEL, [str(error)]


class Batches:
    """Batches (images, labels) without broken images, or with others in their place; they are named and counted.

    Iterating raises ValueError, naming them, once more than `max_broken` different images were broken.

    Args:
        loader: of batches (images, labels, messages about broken images); no images are None.
        max_broken: how many different ones are skipped.
        option: what the user calls max_broken.
        name_all: whether to read on to the end, up to 100 broken images, before the error names them.

    Attributes:
        warn: told of each broken image, once.
    """

    def __init__(self, loader: DataLoader, max_broken: int, option: str = "data.max_broken", name_all: bool = False):
        self.loader = loader
        self.max_broken = max_broken
        self.option = option
        self.name_all = name_all
        self.warn: Callable[[str], None] = lambda message: None
        self._broken: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, broken in self.loader:
            for message in broken:
                self._note(message)
            if images is not None and len(self._broken) <= self.max_broken:
                yield images, labels
        if len(self._broken) > self.max_broken:
            raise self._too_many("")

    def _note(self, message: str) -> None:
        if message in self._broken:
            return
        self._broken[message] = None
        count = len(self._broken)
        if count <= self.max_broken:
            self.warn(f"{message}; skipped, {count} of {self.option}={self.max_broken}")
        elif not self.name_all or count >= self.max_broken + MOST_NAMED:
            raise self._too_many(" so far")

    def _too_many(self, so_far: str) -> ValueError:
        # Those that were skipped have been named.
        names = list(self._broken)[-MOST_NAMED:]
        return ValueError(
            f"{self.option} must be at least the number of broken images, {len(self._broken)}{so_far}: "
            f"{'; '.join(names)}"
        )


def _skip(items: list[tuple[Tensor | None, int, list[str]]]) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """The batch of the items that are whole."""
    whole = [item[:2] for item in items if item[0] is not None]
    images, labels = default_collate(whole) if whole else (None, None)
    return images, labels, [message for _, _, broken in items for message in broken]


def _collate(items: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels = default_collate([item[:2] for item in items])
    return images, labels, [message for _, _, broken in items for message in broken]


# Schedulers and Ctrl-C send these to all processes of a job: a worker loads on until the one that trains has saved.
_STOPPING = {signal.SIGTERM, signal.SIGINT}
# Windows has no masks, macOS does not say who sent a signal.
_SENDER_KNOWN = hasattr(signal, "sigwaitinfo")


class _Loader(DataLoader):
    """Its workers are born with the signals blocked: until they could say so themselves, one would end them."""

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers == 0 or not _SENDER_KNOWN:
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent(number: int) -> None:
    """In a worker: SIGTERM ends it if its own parent sends it, which then waits for that without end."""
    if not _SENDER_KNOWN:
        for stopping in _STOPPING:
            signal.signal(stopping, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    threading.Thread(target=_end_for, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    while True:
        came = signal.sigwaitinfo(_STOPPING)
        if came.si_signo == signal.SIGTERM and came.si_pid == parent:
            # At once, as torch's own handler does; whatever the worker hangs in.
            os._exit(0)


def training_loader(
    dataset: Dataset,
    transform: Callable[[Any], Tensor],
    sampler: EpochSampler,
    workers: int,
    pin_memory: bool,
    prefetch: int = 2,
    max_broken: int = 0,
) -> Batches:
    """Batches (images, labels) in the sampler's order; each iteration runs from the sampler's position to the end.

    Args:
        dataset: items (PIL image, label).
        transform: PIL image -> tensor, may be random.
        sampler: says which images.
        workers: processes that load, kept from epoch to epoch; 0 loads in this one.
        pin_memory: whether batches lie where a GPU can copy them from by itself.
        prefetch: batches that each worker has ready.
        max_broken: how many broken images are replaced, by others that the seed decides.
    """
    loader = _Loader(
        SeededDataset(dataset, transform, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_obey_parent,
        # Its base seed would otherwise be drawn from the generator that the model's noise uses.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
    return Batches(loader, max_broken)


def evaluation_loader(
    dataset: Dataset,
    transform: Callable[[Any], Tensor],
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    max_broken: int | None = None,
    option: str | None = None,
) -> DataLoader | Batches:
    """Batches (images, labels) in the order of the data set; each process has its own contiguous share.

    Args:
        dataset: items (PIL image, label).
        transform: PIL image -> tensor.
        batch_size: images per batch.
        workers: processes that load; 0 loads in this one.
        pin_memory: whether batches lie where a GPU can copy them from by itself.
        rank: number of this process.
        world_size: number of processes.
        max_broken: how many broken images are not counted; None lets the first one's error through. All are read and
            named before the error for more of them.
        option: what the user calls max_broken. With a name, batches come without the broken images; without, others
            with label NO_LABEL take their place, so that every process has as many batches as without.
    """
    first, last = (len(dataset) * part // world_size for part in (rank, rank + 1))
    kind, collate = TolerantDataset, _collate
    if max_broken is None:
        kind, collate = TransformedDataset, None
    elif option is not None:
        kind, collate = SkippingDataset, _skip
    loader = _Loader(
        kind(dataset, transform),
        sampler=range(first, last),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=_obey_parent,
        generator=torch.Generator().manual_seed(0),
    )
    if max_broken is None:
        return loader
    return Batches(loader, max_broken, option or "data.max_broken", name_all=True)
