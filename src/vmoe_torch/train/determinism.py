"""Seeds of all generators, and deterministic CUDA kernels."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(*numbers: int) -> None:
    """Seeds Python's, numpy's and torch's global generators with what these numbers make together."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(device: torch.device, enabled: bool) -> Iterator[None]:
    """Deterministic CUDA kernels for the length of a `with` block; the CPU's are anyway."""
    if device.type != "cuda" or not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Only guards against reading what was never written, at the price of a write.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = fill
