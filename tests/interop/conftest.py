"""Other people's tools on our models: one tiny model, no network, their warnings are their own."""

import contextlib
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.tiny import randomized, tiny_model

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "OPENVINO_TELEMETRY": "0"}
# The library of the Hub reads them when it is imported, ours when it downloads: other tests download from here.
with mock.patch.dict(os.environ, OFFLINE), contextlib.suppress(ImportError):
    import huggingface_hub  # noqa: F401

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 4}


def pytest_collection_modifyitems(items):
    """Warnings of other libraries are no errors here; those that are raised in our own code are."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interop)
            item.add_marker(pytest.mark.filterwarnings(r"error:::vmoe_(torch|kernels)(\..*)?"))
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tiny():
    """Builds a two-block model, the second block sparse, 16-pixel images, 5 classes; random weights, no noise."""

    def build(**changes):
        return randomized(tiny_model(**{**SIZE, "num_classes": 5, "noise_std": 0.0, **changes}))

    return build


@pytest.fixture
def images():
    """(8, 3, 16, 16): one routing group."""
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    """(8,) of 5 classes."""
    return torch.arange(8) % 5
