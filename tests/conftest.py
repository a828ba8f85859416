"""Golden arrays: what the original JAX V-MoE computed (google-research/vmoe, commit 942a78b, float32, CPU)."""

import gc
import json
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@cache
def manifest(folder: str) -> dict:
    """The cases of a golden folder and their configurations."""
    return json.loads((GOLDEN / folder / "manifest.json").read_text())["cases"]


@cache
def _arrays(folder: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / folder / "data.npz") as file:
        return {name: file[name] for name in file.files}


def golden_arrays(folder: str, case: str) -> dict[str, np.ndarray]:
    """The arrays of one case by their name within it."""
    return {name.removeprefix(f"{case}/"): a for name, a in _arrays(folder).items() if name.startswith(f"{case}/")}


def golden_cases(folder: str, keep=lambda config: True) -> list[str]:
    """Names of the cases whose configuration passes."""
    return [name for name, case in manifest(folder).items() if keep(case["config"])]


def relative_error(got: Tensor, want) -> float:
    """Largest absolute difference over the largest absolute value wanted."""
    want = torch.as_tensor(want).to(torch.float64)
    got = got.detach().to(torch.float64)
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    scale = want.abs().max().item()
    return (got - want).abs().max().item() / (scale if scale > 0 else 1.0)


@pytest.fixture(autouse=True)
def _seeded():
    """Every generator that the library draws from: what a test draws does not depend on those before it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def golden_noise(monkeypatch):
    """Replaces the router's noise: the first seed draws the first array, the second seed the second, and so on."""

    def use(*arrays: np.ndarray) -> None:
        seen: dict[int, Tensor] = {}

        def noise(seed: Tensor, rows: int, columns: int, *, by_column: bool) -> Tensor:
            key = int(seed)
            if key not in seen:
                seen[key] = torch.from_numpy(arrays[len(seen)]).reshape(rows, columns)
            return seen[key].t().contiguous().t() if by_column else seen[key]

        # The package has a function of the module's name.
        monkeypatch.setattr(sys.modules["vmoe_kernels.routing.router_op"], "philox_normal", noise)

    return use


def pytest_collection_finish() -> None:
    """What all imports made stays for good: no collection, and no search of the process's objects, goes through it."""
    gc.collect()
    gc.freeze()
