"""Made-up results to draw."""

import pytest
import torch

from vmoe_torch.analyze import KeptPatches, LayerRouting
from vmoe_torch.evaluate import Evaluation, Flops, RoutingSetting


@pytest.fixture
def evaluations():
    return [
        Evaluation(
            RoutingSetting(capacity, selected, priority),
            100,
            0.8 - 0.2 * (1 - capacity) * (2 - priority),
            0.99,
            0.5,
            capacity,
            0.1,
            0.05,
            Flops(1e6 * (1 + selected * capacity), 2e6),
        )
        for selected in (1, 2)
        for capacity in (1.0, 0.5, 0.1)
        for priority in (False, True)
    ]


@pytest.fixture
def routing():
    kept = torch.tensor([[0, 9, 1], [8, 1, 1], [1, 8, 1], [0, 0, 0]])
    places = torch.tensor([[[9, 0, 1], [3, 3, 4]], [[0, 0, 0], [1, 1, 2]]])
    gates = torch.tensor([[0, 3, 7], [6, 4, 0]])
    return LayerRouting(wanted=kept + 1, kept=kept, gates=gates, tokens=10, slots=36, positions=places)


@pytest.fixture
def patches():
    """What two images of 4 x 6 pixels, in 2 x 3 patches, keep at two capacities: all, then less and less."""
    kept = torch.zeros(2, 2, 2, 2, 3, dtype=torch.int64)
    kept[0], kept[1, 0, 0], kept[1, 1, :, 0, 0] = 1, 2, 1
    return KeptPatches(torch.rand(2, 4, 6), ("a", "b"), (1.0, 0.2), 2, {"layer": kept})
