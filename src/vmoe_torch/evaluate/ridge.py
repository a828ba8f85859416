"""The original's few-shot classifier: ridge regression on features to targets of -1 and +1, in closed form.

Dims: N images, D features, C classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# So large that its weight is hardly regularised.
BIAS_FEATURE = 100.0
ROWS = 8192


class Ridge:
    """Ridge regression for any strength, from one eigendecomposition.

    With X the standardised features and the bias feature, the weights are (X'X + l2 I)^-1 X'Y = X'(XX' + l2 I)^-1 Y;
    the smaller of the two Gram matrices is decomposed. In float64: at small l2, float32 has no digits left.

    Args:
        features: (N, D).
        labels: (N,) int64 in 0..C-1.
        num_classes: C.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int):
        features = features.double()
        self.mean = features.mean(0)
        self.std = features.std(0, correction=0) + 1e-5
        x = self._prepared(features)
        y = 2.0 * F.one_hot(labels, num_classes).double() - 1.0
        if x.shape[0] >= x.shape[1]:
            self.eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
            self.left, self.right = vectors, vectors.T @ (x.T @ y)
        else:
            self.eigenvalues, vectors = torch.linalg.eigh(x @ x.T)
            self.left, self.right = x.T @ vectors, vectors.T @ y

    def weights(self, l2: float) -> Tensor:
        """(D + 1, C), the last row that of the bias feature."""
        return (self.left / (self.eigenvalues + l2)) @ self.right

    def predict(self, features: Tensor, l2: Sequence[float]) -> Tensor:
        """Classes (len(l2), N) of features (N, D), for each strength."""
        weights = [self.weights(strength) for strength in l2]
        found = []
        for rows in features.split(ROWS):
            x = self._prepared(rows.double())
            found.append(torch.stack([(x @ weight).argmax(1) for weight in weights]))
        return torch.cat(found, 1)

    def _prepared(self, features: Tensor) -> Tensor:
        return F.pad((features - self.mean) / self.std, (0, 1), value=BIAS_FEATURE)


def shuffled_classes(labels: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """The numbers of each class's images in the order in which shots are taken from them."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]


def shot_accuracies(
    features: Tensor,
    labels: Tensor,
    chosen: Sequence[np.ndarray],
    test_features: Tensor,
    test_labels: Tensor,
    shots: Sequence[int],
    l2: Sequence[float],
) -> Iterator[Tensor]:
    """Test accuracies of classifiers learned from the first images of every class.

    Args:
        features: (N, D) of training images.
        labels: (N,) int64.
        chosen: for each class, rows of `features` in the order of `shuffled_classes`; a class with fewer than the shots
            gives all it has.
        test_features: (M, D).
        test_labels: (M,) int64.
        shots: training images per class.
        l2: strengths.

    Yields:
        For each number of shots (len(l2),) float64.
    """
    for shot in shots:
        rows = torch.from_numpy(np.concatenate([order[:shot] for order in chosen]))
        ridge = Ridge(features[rows], labels[rows], len(chosen))
        yield (ridge.predict(test_features, l2) == test_labels).double().mean(1)


def best_strength(accuracies: Tensor) -> Tensor:
    """One strength for all data sets: that of the best mean rank.

    Args:
        accuracies: (data sets and seeds, shots, strengths).

    Returns:
        (shots,) index of the strength; of equal accuracies the larger strength ranks higher.
    """
    ranks = accuracies.argsort(dim=-1, stable=True).argsort(-1).double().mean(0)
    # argmax would return any of equal ones.
    return (ranks == ranks.amax(-1, keepdim=True)).long().argmax(-1)
