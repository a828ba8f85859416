"""Activations an expert may use, and on a CPU their in-place forms, which a block of rows runs through while in cache.

Forms of several steps are for float32 and float64: between steps float16 would overflow (x^3 does from x = 41) and both
16-bit types would round. PyTorch's own kernels compute in float32 whatever the type, and so do we.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# tanh GELU is x * sigmoid(2u), 2u = x * (_A + _B * x^2), and a sigmoid 1 / (1 + 2^(-2u / ln 2)): a third of the time of
# the tanh form on a CPU.
_A = 2.0 * (2.0 / torch.pi) ** 0.5
_B = _A * 0.044715

_WIDE = (torch.float32, torch.float64)
# Floats that stay in a core's cache while 16-bit numbers are float32.
_WIDE_FLOATS = 1 << 19

# The definition of each activation, differentiable.
FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activate(name: str, pre: Tensor, hidden: Tensor, slope: Tensor | None = None, scale: Tensor | None = None) -> None:
    """Fills `hidden` (n, H) with the activation of `pre` (n, H), and `slope` with its derivative there.

    The derivative is multiplied by `scale` (n, 1), in the dtype that accumulates.
    """
    outs = [hidden] if slope is None else [hidden, slope]
    if pre.dtype in _WIDE:
        _activate(name, pre, *outs)
        if scale is not None:
            slope.mul_(scale)
        return
    # A few rows at a time through float32: PyTorch's own kernels for 16 bits take longer.
    rows = max(_WIDE_FLOATS // max(pre.shape[1], 1), 1)
    wide = torch.empty(1 + len(outs), min(rows, len(pre)), pre.shape[1], device=pre.device)
    for start in range(0, len(pre), rows):
        few = slice(start, start + rows)
        pre_wide, *outs_wide = wide[:, : len(pre[few])]
        activate(name, pre_wide.copy_(pre[few]), *outs_wide, scale=None if scale is None else scale[few])
        for out, out_wide in zip(outs, outs_wide):
            out[few].copy_(out_wide)


def _activate(name: str, pre: Tensor, hidden: Tensor, slope: Tensor | None = None) -> None:
    aten = torch.ops.aten
    if name == "gelu_tanh":
        _gelu_tanh(pre, hidden, slope)
        return
    if name == "gelu":
        aten.gelu.out(pre, out=hidden)
    elif name == "relu":
        torch.clamp(pre, min=0, out=hidden)
    else:
        aten.silu.out(pre, out=hidden)
    if slope is None:
        return
    one = pre.new_ones(()).expand_as(pre)
    if name == "gelu":
        aten.gelu_backward.grad_input(one, pre, grad_input=slope)
    elif name == "relu":
        aten.threshold_backward.grad_input(one, pre, 0, grad_input=slope)
    else:
        aten.silu_backward.grad_input(one, pre, grad_input=slope)


def _gelu_tanh(pre: Tensor, hidden: Tensor, slope: Tensor | None) -> None:
    _quadratic(-_A / math.log(2.0), -_B / math.log(2.0), pre, hidden).mul_(pre).exp2_().add_(1.0)
    if slope is None:
        torch.div(pre, hidden, out=hidden)
        return
    # s + s * (1 - s) * x * d(2u)/dx, with s = sigmoid(2u); in this order, as s * (1 - s) is 0 where x^3 overflows.
    gate = hidden.reciprocal_()
    _quadratic(_A, 3.0 * _B, pre, slope).addcmul_(slope, gate, value=-1.0).mul_(gate).mul_(pre).add_(gate)
    hidden.mul_(pre)


def _quadratic(a: float, b: float, x: Tensor, out: Tensor) -> Tensor:
    """out = a + b * x^2, in one pass."""
    return torch.addcmul(x.new_tensor(a), x, x, value=b, out=out)


def check_activation(name: str) -> None:
    """The name is one of the supported activations."""
    if name not in FORWARD:
        raise ValueError(f"activation must be one of {tuple(FORWARD)}, got {name!r}")
