"""The auxiliary loss reaches the router in any training loop: its gradient is injected into the backward.

`inject_auxiliary_loss(gates, loss, router_weight)` returns the gates unchanged; its backward hands the loss the
gradient it would have had if the loop had added it to the total. That gradient is 1 where the loop calls
`loss.backward()`; where the loop multiplies first, `vmoe_torch.follow_loss_scale` says by what.

- Several backwards through one forward count once: the first one that trains the router.
- A backward that computes no gradient of the router, `torch.autograd.grad(loss, images)` for one, gets nothing, and
  leaves the loss to the next one. Where the router is frozen, it is the layers before it that count.

All of this is decided inside an op that takes the incoming gradient, so neither a compiler nor checkpointing can decide
it early or keep an old answer. A compiled region is one node, and counts as a whole; a backward replayed from a CUDA
graph always counts.
"""

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from vmoe_kernels.common.transforms import carries_tangent, differentiating
from vmoe_torch.layers import loss_scale
from vmoe_torch.layers.unfollowed import note_unfollowed

_ROUTER = 2


@torch.library.custom_op("vmoe::inject_auxiliary_loss", mutates_args=())
def _inject(gates: Tensor, loss: Tensor, router_weight: Tensor) -> Tensor:
    loss_scale.note_recomputation()
    return gates.clone()


@_inject.register_fake
def _(gates, loss, router_weight):
    return torch.empty_like(gates)


@torch.library.custom_op("vmoe::auxiliary_gradient", mutates_args=())
def _gradient(d_gates: Tensor, loss: Tensor, router_trains: bool, create_graph: bool) -> Tensor:
    return _scale(loss.device, router_trains, create_graph).to(loss.device, loss.dtype, copy=True)


@_gradient.register_fake
def _(d_gates, loss, router_trains, create_graph):
    return torch.empty_like(loss)


def _scale(device: torch.device, router_trains: bool, create_graph: bool) -> Tensor:
    """The 0-dim gradient of an auxiliary loss in the backward that runs."""
    node = torch._C._current_autograd_node()
    if node is None:
        return loss_scale.running_scale(device)
    owner, task = loss_scale.owner_of(node)
    scale = loss_scale.scale_of(owner, task)
    earlier = getattr(owner, "vmoe_backward", task) != task
    parameter, counts = _trains(node, router_trains)
    if earlier or not counts or (scale is not None and scale.value is None):
        return torch.zeros((), device=device)
    if create_graph:
        raise ValueError("auxiliary_mode must be 'manual' in training with create_graph=True, got 'injected'")
    owner.vmoe_backward = task
    if scale is None and parameter is not None:
        note_unfollowed(parameter, task)
    if loss_scale.is_capturing(device) and not (scale is not None and scale.captured):
        # A replay must read what holds then.
        return loss_scale.running_scale(device)
    return loss_scale.auxiliary_gradient_scale(device) if scale is None else scale.value


def _trains(node: Node, router_trains: bool) -> tuple[nn.Parameter | None, bool]:
    """A parameter that the running backward trains, the router's if it can be told; and whether its loss counts."""
    if router_trains and getattr(node, "vmoe_layer", False):
        router = node.next_functions[_ROUTER][0]
        return loss_scale.computed_parameter(router), loss_scale.is_computed(router)
    parameter = loss_scale.computed_parameter(node)
    # Weights given from outside, as `torch.func.functional_call` takes them, need not be parameters.
    return parameter, parameter is not None or (router_trains and not loss_scale.has_parameter(node))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.vmoe_layer = True


def _backward(ctx, d_gates):
    (loss,) = ctx.saved_tensors
    gradient = torch.ops.vmoe.auxiliary_gradient(
        d_gates.detach(), loss.detach(), ctx.needs_input_grad[_ROUTER], torch.is_grad_enabled()
    )
    return d_gates, gradient, None


_inject.register_autograd(_backward, setup_context=_setup_context)


def inject_auxiliary_loss(gates: Tensor, loss: Tensor, router_weight: Tensor | None = None) -> Tensor:
    """Returns `gates`; in the backward, `loss` receives the gradient it would have as a term of the total loss.

    Args:
        gates: (T, K), on the path to the output of the layer.
        loss: 0-dim auxiliary loss.
        router_weight: (E, D); a backward that does not compute its gradient injects nothing. None is the gates, so that
            every backward counts.

    Returns:
        (T, K), equal to `gates`.

    Raises:
        ValueError: under forward-mode AD or torch.func's gradients, and in a backward with create_graph=True that
            trains the router, which would differentiate a gradient that is no part of the output.
    """
    if differentiating() or carries_tangent(gates, loss):
        raise ValueError(
            "auxiliary_mode must be 'manual' in training under forward-mode AD and torch.func's gradients, "
            "got 'injected'"
        )
    return torch.ops.vmoe.inject_auxiliary_loss(gates, loss, gates if router_weight is None else router_weight)
