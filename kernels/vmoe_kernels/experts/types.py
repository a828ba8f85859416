"""What travels together below the ops' flat schemas: the experts' weights, and what follows their first GEMM.

Dims: E experts, R rows per expert, D width in, H hidden width, O width out.
"""

from typing import NamedTuple

from torch import Tensor

from vmoe_kernels.common.checks import check_draws, check_number, check_rows, check_seed
from vmoe_kernels.common.impl import check_dtypes
from vmoe_kernels.common.philox import dropout_keep
from vmoe_kernels.experts.activations import check_activation

# How the tuples stand in a schema.
WEIGHTS = "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias"
ACTIVATION = "str activation, float drop, Tensor? seed"


class ExpertWeights(NamedTuple):
    """Two linears of every expert; of one expert, without the E."""

    fc1_weight: Tensor
    """(E, H, D)."""
    fc1_bias: Tensor | None
    """(E, H), or None."""
    fc2_weight: Tensor
    """(E, O, H)."""
    fc2_bias: Tensor | None
    """(E, O), or None."""

    def of(self, expert: int) -> "ExpertWeights":
        """Those of one expert."""
        return ExpertWeights(*(None if each is None else each[expert] for each in self))

    def contiguous(self) -> "ExpertWeights":
        """As the Triton kernels read them."""
        return ExpertWeights(*(contiguous(each) for each in self))

    def new_gradients(self) -> "ExpertWeights":
        """Memory for the gradients, not filled; an absent bias has an empty one, as ops return no None."""
        return ExpertWeights(*(self.fc1_weight.new_empty(0 if each is None else each.shape) for each in self))


class Activation(NamedTuple):
    """What follows an expert's first GEMM: a function of every element, then dropout."""

    name: str
    """Of the function, or "none"."""
    drop: float = 0.0
    """Probability of dropping an element."""
    seed: Tensor | None = None
    """0-dim int64 key of the random numbers, or None without dropout."""

    def keep(self, expert: int, rows: int, width: int) -> Tensor | None:
        """(R, H) bool: what dropout keeps of one expert's elements, or None without dropout."""
        return None if self.seed is None else dropout_keep(self.seed, expert, (rows, width), self.drop)


NO_ACTIVATION = Activation("none")


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """As the Triton kernels read it."""
    return None if tensor is None else tensor.contiguous()


def bundle(
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    drop: float,
    seed: Tensor | None,
) -> tuple[ExpertWeights, Activation]:
    """The tuples of an op's flat arguments; a seed that nothing is dropped with is left out."""
    weights = ExpertWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return weights, Activation(activation, drop, seed if drop > 0 else None)


def check_experts(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    rows: int,
    activation: str,
    drop: float,
    seed: Tensor | None,
) -> float:
    """What every op of experts asks of x (..., D), of R and of its other arguments; the probability as a float."""
    check_dtypes(x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    width = x.shape[-1]
    if fc1_weight.ndim != 3 or fc1_weight.shape[2] != width:
        raise ValueError(f"fc1_weight must be (E, H, D) with D={width}, got {tuple(fc1_weight.shape)}")
    num_experts, hidden, _ = fc1_weight.shape
    if fc2_weight.ndim != 3 or fc2_weight.shape[0] != num_experts or fc2_weight.shape[2] != hidden:
        raise ValueError(
            f"fc2_weight must be (E, O, H) with E={num_experts} and H={hidden}, got {tuple(fc2_weight.shape)}"
        )
    for name, bias, shape in (
        ("fc1_bias", fc1_bias, (num_experts, hidden)),
        ("fc2_bias", fc2_bias, (num_experts, fc2_weight.shape[1])),
    ):
        if bias is not None and tuple(bias.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(bias.shape)}")
    check_activation(activation)
    check_rows(num_experts * rows)
    drop = check_number("drop", drop, "in [0, 1)", 0.0, 1.0)
    if drop > 0:
        check_seed(seed, x.device, "drop > 0")
        check_draws("rows times hidden width of an expert", rows * hidden)
    return drop
