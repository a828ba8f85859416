"""The kernels' activations and their derivatives against float64, from tails to what is not finite."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from vmoe_kernels.experts.activations import FORWARD
from vmoe_kernels.experts.triton_activation import activation_after_gemm, activation_backward_after_gemm
from vmoe_kernels.experts.types import Activation

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
A, B = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


@pytest.fixture(params=[0, 1, -1], ids=["exact", "above", "below"], autouse=True)
def functions_of_a_gpu(request, monkeypatch):
    """Powers and roots are off by all that PTX allows ex2.approx and rsqrt.approx, and what is subnormal is 0."""

    def approximate(name, error):
        function = getattr(interpreter_builder, name)

        def changed(arg):
            exact = function(arg).data
            data = np.where(exact < TINY, 0, exact * (1 + request.param * error))
            return TensorHandle(data.astype(np.float32), arg.dtype)

        monkeypatch.setattr(interpreter_builder, name, changed)

    approximate("create_exp2", 2.0**-22)
    approximate("create_rsqrt", 2.0**-22.9)


def _exact(name: str, x: float) -> tuple[float, float, float, float]:
    """In float64: the activation, its derivative, the size of the derivative's terms, the exponent within."""
    if name == "relu":
        return max(x, 0.0), float(x > 0), 1.0, 0.0
    if name == "gelu":
        below, density = 0.5 * math.erfc(-x * math.sqrt(0.5)), math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * below, below + x * density, below + abs(x * density), 0.5 * x * x
    exponent, inner = (x * (A + B * x * x), A + 3 * B * x * x) if name == "gelu_tanh" else (x, 1.0)
    s, rest = (1 / (1 + math.exp(min(sign * exponent, 700.0))) for sign in (-1, 1))
    return x * s, s + s * rest * x * inner, s + abs(s * rest * x * inner), abs(exponent)


def _run(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' activation and its derivative, for 4,096 elements."""
    pre = x.view(1, 16, 256)
    y = activation_after_gemm(pre.clone(), None, None, Activation(name), save=False)
    slope, again, _, _ = activation_backward_after_gemm(torch.ones_like(pre), pre, None, None, False, Activation(name))
    assert torch.equal(y.nan_to_num(), again.nan_to_num())
    return y.flatten(), slope.flatten()


# Powers overflow where an activation is 0.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("name", FORWARD)
def test_activation_is_float64s_to_a_few_roundings(name):
    sizes = torch.logspace(-30, 18, 1024)
    x = torch.cat([torch.linspace(-20, 20, 2048), sizes, -sizes])
    for value, y, slope in zip(x.tolist(), *(each.tolist() for each in _run(name, x))):
        want_y, want_slope, terms, exponent = _exact(name, value)
        # An exponent is rounded before it is raised: a tail is off by as many roundings as its exponent is large, and
        # ends where its powers are flushed to 0.
        roundings, near = EPS * (16 + min(exponent, 130)), min(abs(value), 20.0)
        assert abs(y - want_y) <= roundings * abs(want_y) + TINY * near, (value, y, want_y)
        assert abs(slope - want_slope) <= roundings * terms + TINY * (1 + near**3), (value, slope, want_slope)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("name", FORWARD)
def test_activation_of_what_is_not_finite_is_pytorchs(name):
    x = torch.ones(4096)
    x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y, slope = _run(name, x)
    torch.testing.assert_close(y[:3], FORWARD[name](x[:3].double()).float(), equal_nan=True)
    assert slope[0].isnan() or name == "relu"
    assert slope[3:].isfinite().all()
