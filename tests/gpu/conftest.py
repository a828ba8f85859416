"""What must be set before the first test uses a GPU, and what large tests ask of it."""

import os
from collections.abc import Callable

import pytest
import torch

# PyTorch reads it once: without it, eager products refuse to run under deterministic algorithms, which poison memory.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def needs_free_memory() -> Callable[[int], None]:
    """Skips the test unless so many GiB of the GPU's memory are free."""

    def check(gibibytes: int) -> None:
        if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
            pytest.skip(f"needs {gibibytes} GiB of free GPU memory")

    return check
