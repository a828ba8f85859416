"""The few-shot classifier: the original's numbers, and what a closed form must satisfy."""

import numpy as np
import pytest
import torch

from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.evaluate.ridge import Ridge, best_strength, shot_accuracies, shuffled_classes


@pytest.mark.parametrize("case", golden_cases("fewshot", lambda config: "seed" not in config))
def test_ridge_equals_the_original(case):
    config = manifest("fewshot")[case]["config"]
    want = {name: torch.from_numpy(array) for name, array in golden_arrays("fewshot", case).items()}
    ridge = Ridge(want["x"], want["y"].long(), config["num_classes"])
    assert relative_error(ridge.mean[None], want["mean"]) <= 1e-6
    assert relative_error(ridge.std[None], want["std"]) <= 1e-6
    assert relative_error(ridge.eigenvalues, want["eigs"]) <= 1e-6
    for l2, weights in zip(config["l2_regs"], want["w"]):
        assert relative_error(ridge.weights(l2), weights) <= 1e-6
    predictions = ridge.predict(want["x_test"], config["l2_regs"])
    accuracy = (predictions == want["y_test"]).double().mean(1)
    assert torch.equal(accuracy, want["accuracy_float64"])
    # The original's own float32 differs from its float64 in as many images.
    assert (predictions != want["preds"]).sum(1).max() <= 1


@pytest.mark.parametrize("case", golden_cases("fewshot", lambda config: "seed" in config))
def test_shots_equal_the_original(case):
    config, want = manifest("fewshot")[case]["config"], golden_arrays("fewshot", case)
    chosen = shuffled_classes(want["y"], config["num_classes"], config["seed"])
    for label, order in enumerate(chosen):
        assert np.array_equal(order, want[f"class_indices/{label}"])
    x, y, x_test, y_test = (torch.from_numpy(want[name]) for name in ("x", "y", "x_test", "y_test"))
    found = shot_accuracies(x, y.long(), chosen, x_test, y_test.long(), config["shots"], config["l2_regs"])
    difference = len(y_test) * (torch.stack(list(found)) - torch.from_numpy(want["accuracy"])).abs()
    # One image at a small strength, where its float32 has no digits left.
    assert difference.max() <= 1.001
    assert difference[:, 6:].max() <= 1e-4


def test_both_gram_matrices_give_the_same_weights():
    x, labels = torch.randn(12, 11), torch.arange(12) % 3
    square = Ridge(x, labels, 3)
    assert square.eigenvalues.shape == (12,)
    # As many rows as columns take the one way, a column more the other; one that says nothing changes nothing.
    wide = Ridge(torch.cat([x, torch.ones(12, 1)], 1), labels, 3)
    assert wide.left.shape == (13, 12)
    for l2 in (2.0**-10, 1.0, 2.0**19):
        both = wide.weights(l2)
        assert relative_error(torch.cat([both[:11], both[12:]]), square.weights(l2)) <= 1e-9


def test_weights_minimise_the_regularised_error():
    x, labels = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 2
    weights = Ridge(x, labels, 2).weights(3.0).requires_grad_()
    standard = torch.cat([(x - x.mean(0)) / (x.std(0, correction=0) + 1e-5), torch.full((30, 1), 100.0)], 1)
    targets = torch.where(labels[:, None] == torch.arange(2), 1.0, -1.0).double()
    loss = ((standard @ weights - targets) ** 2).sum() + 3.0 * (weights**2).sum()
    loss.backward()
    assert weights.grad.abs().max() <= 1e-6


def test_one_strength_serves_all_data_sets():
    accuracies = torch.tensor([[[0.1, 0.5, 0.4]], [[0.9, 0.8, 0.85]]])
    # Ranks 0 2 1 and 2 0 1: all the same on average, so the first.
    assert best_strength(accuracies).tolist() == [0]
    assert best_strength(accuracies[:1]).tolist() == [1]
    # Among equals the last ranks highest.
    assert best_strength(torch.tensor([[[0.5, 0.5, 0.2]]])).tolist() == [1]
