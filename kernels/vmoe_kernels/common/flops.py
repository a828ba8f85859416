"""FLOPs of matrix products, a multiply-add counting as two: one count for the ops, `vmoe eval`, plans and benchmarks.

Experts count at full capacity, as in the paper: an empty row of a buffer costs as much as a filled one. A backward
makes two products for each of the forward's, and counts twice.
"""

from collections.abc import Sequence


def linear_flops(rows: int, weight: Sequence[int]) -> int:
    """Of so many rows times a weight of shape (..., out, in): a linear layer, or a router's logits."""
    return 2 * rows * weight[-2] * weight[-1]


def mlp_flops(rows: int, fc1_weight: Sequence[int], fc2_weight: Sequence[int]) -> int:
    """Of an MLP whose weights have these shapes; `rows` are a dense one's tokens, or the rows of all experts."""
    return linear_flops(rows, fc1_weight) + linear_flops(rows, fc2_weight)
