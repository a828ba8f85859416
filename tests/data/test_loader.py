"""The order of images and their augmentation: by seed, epoch and image alone."""

import multiprocessing
import os
import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from vmoe_torch.data import EpochSampler, evaluation_loader, training_loader


class Numbers(Dataset):
    """Image i is the number i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


def noisy(image):
    """A transform that draws from every generator that timm's transforms draw from."""
    return torch.cat([image, torch.tensor([random.random(), np.random.rand()]), torch.rand(1)])


def images_of(batches):
    """Image numbers of each batch of keys."""
    return [[image for _, image in batch] for batch in batches]


def epoch_images(sampler):
    """Image numbers of a whole epoch, in order."""
    return [image for batch in sampler for _, image in batch]


def test_epoch_has_every_image_once_and_epochs_differ():
    sampler = EpochSampler(20, 5, seed=1)
    first = epoch_images(sampler)
    assert sorted(first) == list(range(20))
    sampler.set_position(1, 0)
    assert epoch_images(sampler) != first
    assert epoch_images(EpochSampler(20, 5, seed=2)) != first
    assert epoch_images(EpochSampler(20, 5, seed=1)) == first


def test_epoch_leaves_out_what_fills_no_update():
    sampler = EpochSampler(11, 5, seed=0)
    assert sampler.updates_per_epoch == len(sampler) == len(list(sampler)) == 2


def test_position_skips_updates():
    sampler = EpochSampler(24, 4, seed=0, accumulation=2)
    sampler.set_position(3, 0)
    whole = list(sampler)
    sampler.set_position(3, 4)
    assert list(sampler) == whole[8:]
    assert len(sampler) == 4
    assert whole[0][0][0] == 3


@pytest.mark.parametrize(("accumulation", "world_size"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_update_has_the_same_images_however_it_is_cut(accumulation, world_size):
    want = images_of(EpochSampler(26, 12, seed=0))
    ranks = [
        images_of(EpochSampler(26, 12, seed=0, accumulation=accumulation, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    # Step by step, and in a step rank by rank.
    batches = [batch for step in zip(*ranks) for batch in step]
    images = [image for batch in batches for image in batch]
    got = [images[:12], images[12:]]
    assert got == want


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (0, "positive multiple"),
        (9, r"positive multiple of accumulation \* processes = 6, got 9"),
        (24, "at most the 20 images of the data set, got 24"),
    ],
)
def test_sampler_refuses(batch_size, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(20, batch_size, seed=0, accumulation=2, world_size=3)


# Python 3.12 warns of every fork beside torch's threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_augmentation_depends_on_seed_epoch_and_image_alone():
    def batches(epoch, update, workers=0, seed=0):
        sampler = EpochSampler(12, 4, seed=seed)
        sampler.set_position(epoch, update)
        return [images for images, _ in training_loader(Numbers(12), noisy, sampler, workers, pin_memory=False)]

    whole = batches(1, 0)
    assert len({tuple(row[1:].tolist()) for row in torch.cat(whole)}) == 12
    torch.rand(3)
    for got in (batches(1, 1), batches(1, 1, workers=1)):
        assert all(torch.equal(a, b) for a, b in zip(got, whole[1:], strict=True))
    by_image = {int(row[0]): row[1:] for row in torch.cat(whole)}
    for other in (batches(2, 0), batches(1, 0, seed=1)):
        assert all(not torch.equal(row[1:], by_image[int(row[0])]) for row in torch.cat(other))


def test_loading_leaves_the_global_generators_alone():
    def draws():
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    want = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert len(list(training_loader(Numbers(8), noisy, EpochSampler(8, 4, seed=0), 0, pin_memory=False))) == 2
    assert len(list(evaluation_loader(Numbers(8), lambda image: image, 4, 0, pin_memory=False))) == 2
    assert draws() == want


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shares_out_every_image_once(world_size):
    labels = []
    for rank in range(world_size):
        loader = evaluation_loader(Numbers(10), lambda image: image, 4, 0, False, rank, world_size)
        labels += [label for _, batch in loader for label in batch.tolist()]
    assert labels == list(range(10))


class Readers(Dataset):
    """Items that say which process read them."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.tensor(os.getpid()), 0


def _kill_from_outside(pid, name):
    """By another process than the worker's parent, as a scheduler does."""
    subprocess.run(["sh", "-c", f"kill -{name} {pid}"], check=True)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs to know who sent a signal")
def test_worker_outlives_signals_from_its_birth_on_but_its_parents():
    loader = evaluation_loader(Readers(), lambda image: image, 1, workers=1, pin_memory=False)
    batches = iter(loader)
    (worker,) = multiprocessing.active_children()
    # Long before it can have said that it wants to.
    for name in ("TERM", "INT"):
        _kill_from_outside(worker.pid, name)
    assert next(batches)[0].item() == worker.pid
    for name in ("TERM", "INT"):
        _kill_from_outside(worker.pid, name)
    assert next(batches)[0].item() == worker.pid
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
