"""The whole sparse MLP after routing: dispatch, expert MLP and combine in one op that never stores expert outputs.

The gate's gradient is <d_y, output>; as output = hidden W2^T + b2, it is <d_y W2, hidden> + <d_y, b2>, and d_y W2 is
needed anyway. So the op saves its inputs and the pre-activation, nothing else. A CPU visits filled rows only, expert by
expert, or where a problem is small all rows at once.

Dims: T tokens, K choices, E experts, R rows per expert, D width in, H hidden width, O width out.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_integer
from vmoe_kernels.common.flops import mlp_flops
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    accumulation_dtype,
    check_floating,
    check_slots,
    no_autocast,
    register_triton,
    use_reference,
    wants_grad,
)
from vmoe_kernels.common.transforms import differs_backward, twin_gradients
from vmoe_kernels.experts import cpu_batched
from vmoe_kernels.experts.cpu import ExpertGradients, ExpertOutputs, Filled, gated_gradients, gated_outputs
from vmoe_kernels.experts.expert_mlp_op import expert_mlp_reference
from vmoe_kernels.experts.types import ACTIVATION, WEIGHTS, Activation, bundle, check_experts
from vmoe_kernels.rows.combine_op import combine_reference, nan_gates
from vmoe_kernels.rows.dispatch_op import choice_of_row, dispatch_reference


@no_autocast
def moe_mlp_reference(
    x: Tensor,
    slots: Tensor,
    gates: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    rows_per_expert: int,
    activation: str = "gelu_tanh",
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Eager twin of `moe_mlp`: the three twins, chained."""
    num_experts, weights = fc1_weight.shape[0], (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    buffer = dispatch_reference(x, slots, num_experts * rows_per_expert).view(num_experts, rows_per_expert, x.shape[1])
    out = expert_mlp_reference(buffer, *weights, activation=activation, drop=drop, seed=seed)
    return combine_reference(out.flatten(0, 1), slots, gates)


def _filled_rows(slots: Tensor, num_experts: int, rows_per_expert: int, width: int, activation: Activation):
    """`Filled` of each expert."""
    choice_of = choice_of_row(slots, num_experts * rows_per_expert).view(num_experts, rows_per_expert)
    for e in range(num_experts):
        rows = (choice_of[e] >= 0).nonzero().squeeze(1)
        choices = choice_of[e, rows]
        keep = activation.keep(e, rows_per_expert, width)
        yield Filled(e, choices, choices // slots.shape[1], None if keep is None else keep[rows])


@torch.library.custom_op(
    "vmoe::moe_mlp",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor slots, Tensor gates, {WEIGHTS}, SymInt rows_per_expert, {ACTIVATION}, bool save, "
    "Tensor? choices=None) -> (Tensor, Tensor)",
)
@no_autocast
def _moe_mlp_op(x, slots, gates, w1, b1, w2, b2, rows_per_expert, activation, drop, seed, save, _choices=None):
    # Without the choices of the rows, which this loop goes by in another form.
    weights, activation = bundle(w1, b1, w2, b2, activation, drop, seed)
    num_experts, width, _ = weights.fc1_weight.shape
    if cpu_batched.takes(x, slots, weights, activation, rows_per_expert):
        y, pre = cpu_batched.outputs(x, slots, gates, weights, activation.name, rows_per_expert)
        return y, pre if save else pre.new_empty(num_experts, 0, width)
    dtype = accumulation_dtype(x.dtype)
    y = nan_gates(gates.to(dtype), slots).expand(-1, weights.fc2_weight.shape[1]).contiguous()
    pre = x.new_empty(num_experts, rows_per_expert if save else 0, width)
    outputs = ExpertOutputs(weights, activation, rows_per_expert, pre if save else None)
    filled = _filled_rows(slots, num_experts, rows_per_expert, width, activation)
    gated_outputs(x, gates, y, filled, outputs, rows_per_expert)
    return y.to(x.dtype), pre


@_moe_mlp_op.register_fake
def _(x, slots, gates, w1, b1, w2, b2, rows_per_expert, activation, drop, seed, save, choices=None):
    num_experts, hidden, _ = w1.shape
    return (
        x.new_empty((x.shape[0], w2.shape[1])),
        x.new_empty((num_experts, rows_per_expert if save else 0, hidden)),
    )


@torch.library.custom_op(
    "vmoe::moe_mlp_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor d_y, Tensor x, Tensor slots, Tensor gates, Tensor pre, {WEIGHTS}, SymInt rows_per_expert, "
    f"{ACTIVATION}, Tensor? choices=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@no_autocast
def _moe_mlp_backward_op(
    d_y, x, slots, gates, pre, w1, b1, w2, b2, rows_per_expert, activation, drop, seed, _choices=None
):
    weights, activation = bundle(w1, b1, w2, b2, activation, drop, seed)
    num_experts, width, _ = weights.fc1_weight.shape
    if cpu_batched.takes(x, slots, weights, activation, rows_per_expert):
        d_x, d_gates, d_weights = cpu_batched.gradients(d_y, x, slots, gates, pre, weights, activation.name)
        return (d_x, d_gates, *d_weights)
    gradients = ExpertGradients(weights, activation, pre)
    filled = _filled_rows(slots, num_experts, rows_per_expert, width, activation)
    return (*gated_gradients(d_y, x, gates, filled, gradients), *gradients.results())


@_moe_mlp_backward_op.register_fake
def _(d_y, x, slots, gates, pre, w1, b1, w2, b2, rows_per_expert, activation, drop, seed, choices=None):
    gradients = bundle(w1, b1, w2, b2, activation, drop, seed)[0].new_gradients()
    return (x.new_empty(x.shape), gates.new_empty(gates.shape), *gradients)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.rows_per_expert, ctx.activation, ctx.drop, seed, _, choices = inputs
    ctx.save_for_backward(*tensors, output[1], seed, choices)
    ctx.mark_non_differentiable(output[1])
    # Else autograd would fill a zero gradient of the size of the pre-activation.
    ctx.set_materialize_grads(False)


def _backward(ctx, d_y, _pre):
    if d_y is None:
        return (None,) * 13
    x, slots, gates, *weights, pre, seed, choices = ctx.saved_tensors
    if differs_backward():

        def twin(x, gates, *weights):
            settings = {"rows_per_expert": ctx.rows_per_expert, "activation": ctx.activation}
            return moe_mlp_reference(x, slots, gates, *weights, **settings, drop=ctx.drop, seed=seed)

        gradients = twin_gradients(twin, (x, gates, *weights), (d_y,))
    else:
        settings = (ctx.rows_per_expert, ctx.activation, ctx.drop, seed, choices)
        gradients = torch.ops.vmoe.moe_mlp_backward(d_y.contiguous(), x, slots, gates, pre, *weights, *settings)
        gradients = (None if of is None else gradient for gradient, of in zip(gradients, (x, gates, *weights)))
    d_x, *others = gradients
    return (d_x, None, *others, None, None, None, None, None, None)


_moe_mlp_op.register_autograd(_backward, setup_context=_setup_context)
_moe_mlp_op.register_vmap(vmap.moe_mlp)


@register_flop_formula(torch.ops.vmoe.moe_mlp)
def _moe_mlp_flops(x_shape, slots_shape, gates_shape, fc1_shape, b1_shape, fc2_shape, b2_shape, rows, *_, **__) -> int:
    return mlp_flops(fc1_shape[0] * rows, fc1_shape, fc2_shape)


@register_flop_formula(torch.ops.vmoe.moe_mlp_backward)
def _moe_mlp_backward_flops(dy_shape, x_shape, slots, gates, pre_shape, fc1_shape, b1, fc2_shape, b2, rows, *_, **__):
    return 2 * mlp_flops(fc1_shape[0] * rows, fc1_shape, fc2_shape)


def moe_mlp(
    x: Tensor,
    slots: Tensor,
    gates: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    rows_per_expert: int,
    activation: str = "gelu_tanh",
    drop: float = 0.0,
    seed: Tensor | None = None,
    choices: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sends tokens to their slots, runs every expert and sums each token's outputs by its gates.

    Args:
        x: (T, D) tokens.
        slots: (T, K) int32 row of each choice in the (E * R) buffer, unique, or -1 where dropped.
        gates: (T, K) weights, not renormalised over kept choices.
        fc1_weight: (E, H, D).
        fc1_bias: (E, H) or None.
        fc2_weight: (E, O, H).
        fc2_bias: (E, O) or None.
        rows_per_expert: R, as `vmoe_kernels.rows_per_expert` gives it.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop: probability of dropping a hidden activation.
        seed: 0-dim int64 key; needed with dropout.
        choices: (E * R,) int32 choice that each row holds, as `assign_rows` gives it with these very slots; None is
            worked out where it is needed.
        impl: "auto", "triton" or "reference".

    Returns:
        (T, O) in the dtype of `x`; tokens whose choices were all dropped are 0.

    Raises:
        ValueError: if shapes, dtypes, devices, the activation or the dropout are off.
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_floating(x=x, gates=gates, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    if x.ndim != 2:
        raise ValueError(f"x must be (T, D), got {tuple(x.shape)}")
    check_slots(slots, x.shape[0], x.device)
    if gates.shape != slots.shape:
        raise ValueError(f"gates must have the shape of slots {tuple(slots.shape)}, got {tuple(gates.shape)}")
    rows_per_expert = check_integer("rows_per_expert", rows_per_expert, 0)
    if choices is not None:
        found, num_rows = (choices.dtype, choices.device, choices.shape), len(fc1_weight) * rows_per_expert
        if found != (torch.int32, x.device, (num_rows,)):
            rule = f"choices must be (E * R,) int32 on {x.device} with E={len(fc1_weight)} and R={rows_per_expert}"
            raise ValueError(f"{rule}, got {tuple(choices.shape)} {choices.dtype} on {choices.device}")
    drop = check_experts(x, *weights, rows=rows_per_expert, activation=activation, drop=drop, seed=seed)
    if use_reference(impl, x, gates, *weights):
        return moe_mlp_reference(
            x, slots, gates, *weights, rows_per_expert=rows_per_expert, activation=activation, drop=drop, seed=seed
        )
    save = wants_grad(x, gates, *weights)
    return torch.ops.vmoe.moe_mlp(x, slots, gates, *weights, rows_per_expert, activation, drop, seed, save, choices)[0]


if HAS_TRITON:
    from vmoe_kernels.experts.triton_moe_mlp import moe_mlp_backward_triton, moe_mlp_triton

    register_triton(_moe_mlp_op, moe_mlp_triton)
    register_triton(_moe_mlp_backward_op, moe_mlp_backward_triton)
