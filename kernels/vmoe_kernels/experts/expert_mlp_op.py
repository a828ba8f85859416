"""Expert MLP: out[e] = activation(x[e] @ fc1[e]^T + b1[e]) @ fc2[e]^T + b2[e], one MLP per expert.

The backward keeps x and the pre-activation only; everything else is recomputed.

Dims: E experts, R rows per expert, D width in, H hidden width, O width out.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_kernels import vmap
from vmoe_kernels.common.flops import mlp_flops
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    check_floating,
    no_autocast,
    register_triton,
    use_reference,
    wants_grad,
)
from vmoe_kernels.common.philox import dropout_keep
from vmoe_kernels.common.transforms import differs_backward, twin_gradients
from vmoe_kernels.experts.activations import FORWARD
from vmoe_kernels.experts.cpu import ExpertGradients, ExpertOutputs, gradient_blocks, row_blocks
from vmoe_kernels.experts.types import ACTIVATION, WEIGHTS, bundle, check_experts


@no_autocast
def expert_mlp_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Eager twin of `expert_mlp`: two batched GEMMs."""
    keep = None
    if drop > 0:
        shape = x.shape[1], fc1_weight.shape[1]
        keep = torch.stack([dropout_keep(seed, e, shape, drop) for e in range(x.shape[0])])
    return masked_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, keep)


def masked_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    drop: float,
    keep: Tensor | None,
) -> Tensor:
    """The eager MLPs of (E, R, D) rows; keep (E, R, H) says what dropout leaves, None is without."""
    hidden = x @ fc1_weight.transpose(1, 2)
    if fc1_bias is not None:
        hidden = hidden + fc1_bias.unsqueeze(1)
    hidden = FORWARD[activation](hidden)
    if keep is not None:
        hidden = torch.where(keep, hidden / (1.0 - drop), 0.0)
    out = hidden @ fc2_weight.transpose(1, 2)
    return out if fc2_bias is None else out + fc2_bias.unsqueeze(1)


@torch.library.custom_op(
    "vmoe::expert_mlp",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, {WEIGHTS}, {ACTIVATION}, bool save) -> (Tensor, Tensor)",
)
@no_autocast
def _expert_mlp_op(x, *arguments):
    *arguments, save = arguments
    weights, activation = bundle(*arguments)
    num_experts, rows, _ = x.shape
    width = weights.fc1_weight.shape[1]
    out = x.new_empty(num_experts, rows, weights.fc2_weight.shape[1])
    pre = x.new_empty(num_experts, rows if save else 0, width)
    outputs = ExpertOutputs(weights, activation, rows, pre if save else None)
    for e in range(num_experts):
        keep = activation.keep(e, rows, width)
        for block in row_blocks(rows, width):
            outputs.fill(out[e, block], e, block, x[e, block], keep)
    return out, pre


@_expert_mlp_op.register_fake
def _(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed, save):
    num_experts, rows, _ = x.shape
    return (
        x.new_empty((num_experts, rows, fc2_weight.shape[1])),
        x.new_empty((num_experts, rows if save else 0, fc1_weight.shape[1])),
    )


@torch.library.custom_op(
    "vmoe::expert_mlp_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor d_out, Tensor x, Tensor pre, {WEIGHTS}, {ACTIVATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@no_autocast
def _expert_mlp_backward_op(d_out, x, pre, *arguments):
    weights, activation = bundle(*arguments)
    num_experts, rows, _ = x.shape
    width = weights.fc1_weight.shape[1]
    gradients = ExpertGradients(weights, activation, pre)
    d_x = x.new_empty(x.shape)
    for e in range(num_experts):
        keep = activation.keep(e, rows, width)
        for block in gradient_blocks(rows, width, x.dtype):
            d_x[e, block], _ = gradients.add(e, block, x[e, block], d_out[e, block], keep)
    return (d_x, *gradients.results())


@_expert_mlp_backward_op.register_fake
def _(d_out, x, pre, *arguments):
    return (x.new_empty(x.shape), *bundle(*arguments)[0].new_gradients())


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.drop, seed, _ = inputs
    ctx.save_for_backward(*tensors, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    # Else autograd would fill a zero gradient of the size of the pre-activation.
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, _pre):
    if d_out is None:
        return (None,) * 9
    x, *weights, pre, seed = ctx.saved_tensors
    if differs_backward():
        twin = partial(expert_mlp_reference, activation=ctx.activation, drop=ctx.drop, seed=seed)
        gradients = twin_gradients(twin, (x, *weights), (d_out,))
    else:
        gradients = torch.ops.vmoe.expert_mlp_backward(
            d_out.contiguous(), x, pre, *weights, ctx.activation, ctx.drop, seed
        )
        gradients = (None if of is None else gradient for gradient, of in zip(gradients, (x, *weights)))
    return (*gradients, None, None, None, None)


_expert_mlp_op.register_autograd(_backward, setup_context=_setup_context)
_expert_mlp_op.register_vmap(vmap.expert_mlp)


@register_flop_formula(torch.ops.vmoe.expert_mlp)
def _expert_mlp_flops(x_shape, fc1_shape, b1_shape, fc2_shape, *_, **__) -> int:
    return mlp_flops(x_shape[0] * x_shape[1], fc1_shape, fc2_shape)


@register_flop_formula(torch.ops.vmoe.expert_mlp_backward)
def _expert_mlp_backward_flops(d_out_shape, x_shape, pre_shape, fc1_shape, b1_shape, fc2_shape, *_, **__) -> int:
    return 2 * mlp_flops(x_shape[0] * x_shape[1], fc1_shape, fc2_shape)


def expert_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    drop: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Runs every expert's MLP on its rows of the buffer.

    Args:
        x: (E, R, D) buffer of `dispatch`, viewed per expert.
        fc1_weight: (E, H, D).
        fc1_bias: (E, H) or None.
        fc2_weight: (E, O, H).
        fc2_bias: (E, O) or None.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop: probability of dropping a hidden activation.
        seed: 0-dim int64 key; needed with dropout.
        impl: "auto", "triton" or "reference".

    Returns:
        (E, R, O) in the dtype of `x`.

    Raises:
        ValueError: if shapes, dtypes, devices, the activation or the dropout are off.
    """
    check_floating(x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    if x.ndim != 3 or x.shape[0] != fc1_weight.shape[0]:
        raise ValueError(f"x must be (E, R, D) with E={fc1_weight.shape[0]}, got {tuple(x.shape)}")
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    drop = check_experts(x, *weights, rows=x.shape[1], activation=activation, drop=drop, seed=seed)
    if use_reference(impl, x, *weights):
        return expert_mlp_reference(x, *weights, activation=activation, drop=drop, seed=seed)
    return torch.ops.vmoe.expert_mlp(x, *weights, activation, drop, seed, wants_grad(x, *weights))[0]


if HAS_TRITON:
    from vmoe_kernels.experts.triton_expert_mlp import expert_mlp_backward_triton, expert_mlp_triton

    register_triton(_expert_mlp_op, expert_mlp_triton)
    register_triton(_expert_mlp_backward_op, expert_mlp_backward_triton)
