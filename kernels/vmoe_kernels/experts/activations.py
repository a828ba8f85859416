"""Activations an expert may use, with in-place CPU forms that a block of rows runs through while it is in cache.

Forms of several steps are for float32 and float64: between steps float16 would overflow (x^3 does from x = 41) and both
16-bit types would round. PyTorch's own kernels compute in float32 whatever the type, and so do we.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# tanh GELU is x * sigmoid(2u) with 2u = x * (_A + _B * x^2): half the time of the tanh form on a CPU.
_A = 2.0 * (2.0 / torch.pi) ** 0.5
_B = _A * 0.044715

_WIDE = (torch.float32, torch.float64)
# Floats that stay in a core's cache while 16-bit numbers are float32.
_WIDE_FLOATS = 1 << 18

# The definition of each activation, differentiable.
FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activate(name: str, pre: Tensor, hidden: Tensor) -> None:
    """Fills `hidden` (n, H) with the activation of `pre` (n, H)."""
    aten = torch.ops.aten
    if name == "gelu_tanh" and pre.dtype not in _WIDE:
        # A few rows at a time through float32: half the time of PyTorch's own kernel, which takes a tanh.
        rows = max(_WIDE_FLOATS // max(pre.shape[1], 1), 1)
        wide, result = torch.empty(2, min(rows, len(pre)), pre.shape[1], device=pre.device)
        for few, out in zip(pre.split(rows), hidden.split(rows)):
            few, out_wide = wide[: len(few)].copy_(few), result[: len(few)]
            activate(name, few, out_wide)
            out.copy_(out_wide)
    elif name == "gelu_tanh":
        aten.mul.out(pre, pre, out=hidden)
        hidden.mul_(_B).add_(_A).mul_(pre).sigmoid_().mul_(pre)
    elif name == "gelu":
        aten.gelu.out(pre, out=hidden)
    elif name == "relu":
        torch.clamp(pre, min=0, out=hidden)
    else:
        aten.silu.out(pre, out=hidden)


def chain(name: str, pre: Tensor, grad: Tensor, work: tuple[Tensor, Tensor]) -> None:
    """Turns `grad` (n, H), the gradient of the hidden activations, into that of `pre` (n, H), in place.

    `work` is memory of the same shape, twice: fresh pages would cost a CPU more than the arithmetic.
    """
    aten = torch.ops.aten
    if name == "gelu_tanh" and pre.dtype not in _WIDE:
        aten.gelu_backward.grad_input(grad, pre, approximate="tanh", grad_input=grad)
    elif name == "gelu_tanh":
        # s + s * (1 - s) * x * d(2u)/dx, with s = sigmoid(2u); in this order, as s * (1 - s) is 0 where x^3 overflows.
        square, gate = work
        torch.mul(pre, pre, out=square)
        torch.mul(square, _B, out=gate).add_(_A).mul_(pre).sigmoid_()
        square.mul_(3.0 * _B).add_(_A)
        grad.mul_(square.addcmul_(square, gate, value=-1.0).mul_(gate).mul_(pre).add_(gate))
    elif name == "gelu":
        aten.gelu_backward.grad_input(grad, pre, grad_input=grad)
    elif name == "relu":
        aten.threshold_backward.grad_input(grad, pre, 0, grad_input=grad)
    else:
        aten.silu_backward.grad_input(grad, pre, grad_input=grad)


def check_activation(name: str) -> None:
    """The name is one of the supported activations."""
    if name not in FORWARD:
        raise ValueError(f"activation must be one of {tuple(FORWARD)}, got {name!r}")
