"""Bytes kept for the backward: counted by storage, weights left out, and few at the benchmark's own shapes."""

import pytest
import torch

from benchmarks.harness.cases import LAYERS
from benchmarks.harness.saved import count_saved, saved_bytes


def test_count_saved_takes_each_storage_once_and_no_weights():
    def call(weights):
        x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        weights.append(weight)
        # x is kept by both products, the second product's input by the exponential and the product.
        y = (x @ weight).exp()
        return (y @ weight) + (x * x).sum()

    assert count_saved(call) == (8 * 4 + 8 * 4) * 4


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_saved_bytes_stay_below_their_bar(case):
    ours, eager = saved_bytes(case, "auto"), saved_bytes(case, "reference")
    # At least the tokens and the pre-activation.
    assert ours > 2 * (case.num_tokens * case.width + case.num_rows * case.hidden)
    assert ours <= 0.45 * eager
