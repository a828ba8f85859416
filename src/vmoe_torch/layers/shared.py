"""A shared expert: a dense MLP that every token passes beside the experts that its router finds for it."""

import math
import numbers
from typing import Any

import torch
from timm.layers import GELUTanh, Mlp
from torch import nn

from vmoe_kernels.common.flops import mlp_flops

# By the kernels' names.
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "relu": nn.ReLU, "silu": nn.SiLU}


def _width(shared_expert_hidden: int | float | None, hidden: int) -> int:
    """Hidden units, 0 for none."""
    rule = f"shared_expert_hidden must be None, at least 0 units or, as a float, a share of H={hidden} that is whole"
    value = 0 if shared_expert_hidden is None else shared_expert_hidden
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{rule}, got {value!r}")
    width = value if isinstance(value, numbers.Integral) else value * hidden
    if not math.isfinite(width) or width < 0 or abs(width - round(width)) > 1e-6 * hidden:
        raise ValueError(f"{rule}, got {value}")
    return round(width)


def shared_mlp(
    shared_expert_hidden: int | float | None,
    widths: tuple[int, int, int],
    activation: str,
    bias: bool,
    drop: tuple[float, float],
    **dd: Any,
) -> Mlp | None:
    """The shared expert of a layer, timm's `Mlp`, which begins as the other experts do; None for 0 units.

    Args:
        shared_expert_hidden: as of `MoeOptions`.
        widths: D, H and O of the layer.
        activation: the kernels' name.
        bias: whether there are biases.
        drop: dropout of the hidden units, and of the output.
        **dd: device and dtype of the parameters.

    Raises:
        ValueError: if the width is not a number of at least 0, or a share that comes to no whole number.
    """
    in_features, hidden, out_features = widths
    width = _width(shared_expert_hidden, hidden)
    if width == 0:
        return None
    mlp = Mlp(in_features, width, out_features, act_layer=ACTIVATIONS[activation], bias=bias, drop=drop, **dd)
    with torch.no_grad():
        for linear in (mlp.fc1, mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.normal_(linear.bias, std=1e-6)
    return mlp


def shared_flops(mlp: Mlp | None, tokens: int) -> int:
    """Of so many tokens."""
    return 0 if mlp is None else mlp_flops(tokens, mlp.fc1.weight.shape, mlp.fc2.weight.shape)
