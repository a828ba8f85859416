"""The auxiliary loss reaches the router in any training loop: its gradient is injected into the backward.

`inject_auxiliary_loss(gates, loss)` returns the gates unchanged; its backward hands the loss the gradient it would have
had if the loop had added it to the total. That gradient is 1 where the loop calls `loss.backward()`, and the loss scale
divided by the accumulation steps where the loop multiplies first; `vmoe_torch.timm_train` records it per device with
`set_auxiliary_gradient_scale` before the backward reaches any layer.

The scale is read inside an op that takes the incoming gradient, so neither a compiler nor checkpointing can read it
early or keep an old one.
"""

import torch
from torch import Tensor

from vmoe_kernels.transforms import carries_tangent, differentiating

_scales: dict[torch.device, Tensor] = {}


def auxiliary_gradient_scale(device: torch.device) -> Tensor:
    """The 0-dim float32 gradient that an auxiliary loss on this device gets."""
    if device.index is None and device.type != "cpu":
        # "cuda" is the current one; tensors name theirs by number.
        device = torch.empty(0, device=device).device
    if device not in _scales:
        _scales[device] = torch.ones((), device=device)
    return _scales[device]


def set_auxiliary_gradient_scale(scale: Tensor | float, device: torch.device | None = None) -> None:
    """Sets the scale in place, without a host synchronisation when it is a tensor on the device."""
    device = scale.device if isinstance(scale, Tensor) else torch.device(device or "cpu")
    buffer = auxiliary_gradient_scale(device)
    with torch.no_grad():
        buffer.copy_(scale) if isinstance(scale, Tensor) else buffer.fill_(scale)


@torch.library.custom_op("vmoe::inject_auxiliary_loss", mutates_args=())
def _inject(gates: Tensor, loss: Tensor) -> Tensor:
    return gates.clone()


@_inject.register_fake
def _(gates, loss):
    return torch.empty_like(gates)


@torch.library.custom_op("vmoe::auxiliary_gradient", mutates_args=())
def _gradient(d_gates: Tensor, loss: Tensor) -> Tensor:
    return auxiliary_gradient_scale(loss.device).to(loss.dtype, copy=True)


@_gradient.register_fake
def _(d_gates, loss):
    return torch.empty_like(loss)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward(ctx, d_gates):
    (loss,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise ValueError("auxiliary_mode must be 'manual' in training with create_graph=True, got 'injected'")
    return d_gates, torch.ops.vmoe.auxiliary_gradient(d_gates, loss)


_inject.register_autograd(_backward, setup_context=_setup_context)


def inject_auxiliary_loss(gates: Tensor, loss: Tensor) -> Tensor:
    """Returns `gates`; in the backward, `loss` receives the gradient it would have as a term of the total loss.

    Args:
        gates: (T, K), on the path to the output of the layer.
        loss: 0-dim auxiliary loss.

    Returns:
        (T, K), equal to `gates`.

    Raises:
        ValueError: under forward-mode AD or torch.func's gradients, and in a backward with create_graph=True, which
            would differentiate a gradient that is no part of the output.
    """
    if differentiating() or carries_tangent(gates, loss):
        raise ValueError(
            "auxiliary_mode must be 'manual' in training under forward-mode AD and torch.func's gradients, "
            "got 'injected'"
        )
    return torch.ops.vmoe.inject_auxiliary_loss(gates, loss)
