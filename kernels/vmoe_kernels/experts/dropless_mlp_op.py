"""The sparse MLP with as many rows for every expert as its tokens need: `moe_mlp` without capacities.

Rows lie as `assign_dropless_slots` says: expert after expert, in a buffer whose size follows from T, K and E alone.
What is saved and how gradients are had is as in `moe_mlp`; dropout counts its random numbers by choice, not by row.

Dims: T tokens, K choices, E experts, N rows of the buffer, D width in, H hidden width, O width out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_kernels import vmap
from vmoe_kernels.common.checks import check_draws, check_rows
from vmoe_kernels.common.flops import mlp_flops
from vmoe_kernels.common.groups import dropless_rows, expert_of_slot
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    accumulation_dtype,
    check_floating,
    check_slots,
    no_autocast,
    register_triton,
    row_tile,
    use_reference,
    wants_grad,
)
from vmoe_kernels.common.philox import dropout_keep
from vmoe_kernels.common.transforms import differs_backward, twin_gradients
from vmoe_kernels.experts.cpu import ExpertGradients, ExpertOutputs, Filled, gated_gradients, gated_outputs
from vmoe_kernels.experts.expert_mlp_op import masked_mlp
from vmoe_kernels.experts.types import ACTIVATION, WEIGHTS, Activation, bundle, check_experts
from vmoe_kernels.rows.combine_op import combine_reference, nan_gates
from vmoe_kernels.rows.dispatch_op import choice_of_row, dispatch_reference


@no_autocast
def dropless_mlp_reference(
    x: Tensor,
    slots: Tensor,
    spans: Tensor,
    gates: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Eager twin of `dropless_mlp`: every expert has room for every token, as no shape may depend on the routing."""
    (num_tokens, width), num_experts, hidden = x.shape, fc1_weight.shape[0], fc1_weight.shape[1]
    experts = expert_of_slot(slots, spans[0]).long()
    places = slots - spans[0][experts.clamp(min=0)]
    rows = torch.where(experts < 0, -1, experts * num_tokens + places).to(torch.int32)
    buffer = dispatch_reference(x, rows, num_experts * num_tokens).view(num_experts, num_tokens, width)
    keep = None
    if drop > 0:
        kept = dropout_keep(seed, 0, (slots.numel(), hidden), drop)
        index = torch.where(rows < 0, num_experts * num_tokens, rows).long().reshape(-1)
        keep = kept.new_ones(num_experts * num_tokens + 1, hidden).index_copy(0, index, kept)[:-1]
        keep = keep.view(num_experts, num_tokens, hidden)
    out = masked_mlp(buffer, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, keep)
    return combine_reference(out.flatten(0, 1), rows, gates)


def _filled_rows(slots: Tensor, spans: list[list[int]], width: int, activation: Activation) -> Iterator[Filled]:
    """`Filled` of each expert."""
    choice_of = choice_of_row(slots, max(spans[1]))
    keep = activation.keep(0, slots.numel(), width)
    for expert, (first, end) in enumerate(zip(*spans)):
        choices = choice_of[first:end]
        yield Filled(expert, choices, choices // slots.shape[1], None if keep is None else keep[choices])


def _sizes(spans: list[list[int]]) -> list[int]:
    return [end - first for first, end in zip(*spans)]


@torch.library.custom_op(
    "vmoe::dropless_mlp",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor slots, Tensor spans, Tensor gates, {WEIGHTS}, {ACTIVATION}, bool save)"
    " -> (Tensor, Tensor)",
)
@no_autocast
def _dropless_mlp_op(x, slots, spans, gates, *arguments):
    *arguments, save = arguments
    weights, activation = bundle(*arguments)
    spans, width = spans.tolist(), weights.fc1_weight.shape[1]
    sizes = _sizes(spans)
    y = nan_gates(gates.to(accumulation_dtype(x.dtype)), slots).expand(-1, weights.fc2_weight.shape[1]).contiguous()
    # Packed, whatever lies between the experts' rows in the buffer.
    pre = x.new_empty(slots.numel() if save else 0, width)
    outputs = ExpertOutputs(weights, activation, max(sizes), pre[: sum(sizes)].split(sizes) if save else None)
    gated_outputs(x, gates, y, _filled_rows(slots, spans, width, activation), outputs, max(sizes))
    return y.to(x.dtype), pre


def _rows_of_pre(slots: Tensor, num_experts: int) -> int:
    """Rows of the saved pre-activation: of a buffer with the tiles of the device."""
    return dropless_rows(slots.numel(), num_experts, row_tile(slots.device))


@_dropless_mlp_op.register_fake
def _(x, slots, spans, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed, save):
    num_experts, hidden, _ = fc1_weight.shape
    rows = _rows_of_pre(slots, num_experts) if save else 0
    return x.new_empty((x.shape[0], fc2_weight.shape[1])), x.new_empty((rows, hidden))


@torch.library.custom_op(
    "vmoe::dropless_mlp_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor d_y, Tensor x, Tensor slots, Tensor spans, Tensor gates, Tensor pre, {WEIGHTS}, {ACTIVATION})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@no_autocast
def _dropless_mlp_backward_op(d_y, x, slots, spans, gates, pre, *arguments):
    weights, activation = bundle(*arguments)
    spans = spans.tolist()
    sizes = _sizes(spans)
    gradients = ExpertGradients(weights, activation, pre[: sum(sizes)].split(sizes))
    filled = _filled_rows(slots, spans, weights.fc1_weight.shape[1], activation)
    return (*gated_gradients(d_y, x, gates, filled, gradients), *gradients.results())


@_dropless_mlp_backward_op.register_fake
def _(d_y, x, slots, spans, gates, pre, *arguments):
    return (x.new_empty(x.shape), gates.new_empty(gates.shape), *bundle(*arguments)[0].new_gradients())


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.drop, seed, _ = inputs
    ctx.save_for_backward(*tensors, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    # Else autograd would fill a zero gradient of the size of the pre-activation.
    ctx.set_materialize_grads(False)


def _backward(ctx, d_y, _pre):
    if d_y is None:
        return (None,) * 12
    x, slots, spans, gates, *weights, pre, seed = ctx.saved_tensors
    if differs_backward():

        def twin(x, gates, *weights):
            settings = {"activation": ctx.activation, "drop": ctx.drop, "seed": seed}
            return dropless_mlp_reference(x, slots, spans, gates, *weights, **settings)

        gradients = twin_gradients(twin, (x, gates, *weights), (d_y,))
    else:
        gradients = torch.ops.vmoe.dropless_mlp_backward(
            d_y.contiguous(), x, slots, spans, gates, pre, *weights, ctx.activation, ctx.drop, seed
        )
        gradients = (None if of is None else gradient for gradient, of in zip(gradients, (x, gates, *weights)))
    d_x, *others = gradients
    return (d_x, None, None, *others, None, None, None, None)


_dropless_mlp_op.register_autograd(_backward, setup_context=_setup_context)
_dropless_mlp_op.register_vmap(vmap.dropless_mlp)


@register_flop_formula(torch.ops.vmoe.dropless_mlp)
def _dropless_mlp_flops(
    x_shape, slots_shape, spans_shape, gates_shape, fc1_shape, b1_shape, fc2_shape, *_, **__
) -> int:
    return mlp_flops(slots_shape[0] * slots_shape[1], fc1_shape, fc2_shape)


@register_flop_formula(torch.ops.vmoe.dropless_mlp_backward)
def _dropless_mlp_backward_flops(
    dy_shape, x, slots_shape, spans, gates, pre, fc1_shape, b1, fc2_shape, *_, **__
) -> int:
    return 2 * mlp_flops(slots_shape[0] * slots_shape[1], fc1_shape, fc2_shape)


def dropless_mlp(
    x: Tensor,
    slots: Tensor,
    spans: Tensor,
    gates: Tensor,
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
    """Sends every choice to its expert, runs them all and sums each token's outputs by its gates.

    Args:
        x: (T, D) tokens.
        slots: (T, K) int32, of `assign_dropless_slots` on the same device; -1 adds nothing.
        spans: (2, E) int32, likewise.
        gates: (T, K) weights.
        fc1_weight: (E, H, D).
        fc1_bias: (E, H) or None.
        fc2_weight: (E, O, H).
        fc2_bias: (E, O) or None.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop: probability of dropping a hidden activation.
        seed: 0-dim int64 key; needed with dropout.
        impl: "auto", "triton" or "reference".

    Returns:
        (T, O) in the dtype of `x`.

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
    shape = (2, fc1_weight.shape[0])
    if spans.dtype != torch.int32 or tuple(spans.shape) != shape or spans.device != x.device:
        got = f"{tuple(spans.shape)} {spans.dtype} on {spans.device}"
        raise ValueError(f"spans must be {shape} int32 on {x.device}, got {got}")
    drop = check_experts(x, *weights, rows=0, activation=activation, drop=drop, seed=seed)
    check_rows(_rows_of_pre(slots, fc1_weight.shape[0]))
    if drop > 0:
        check_draws("choices times hidden width of an expert", slots.numel() * fc1_weight.shape[1])
    if use_reference(impl, x, gates, *weights):
        return dropless_mlp_reference(x, slots, spans, gates, *weights, activation=activation, drop=drop, seed=seed)
    save = wants_grad(x, gates, *weights)
    return torch.ops.vmoe.dropless_mlp(x, slots, spans, gates, *weights, activation, drop, seed, save)[0]


if HAS_TRITON:
    from vmoe_kernels.experts.triton_moe_mlp import dropless_mlp_backward_triton, dropless_mlp_triton

    register_triton(_dropless_mlp_op, dropless_mlp_triton)
    register_triton(_dropless_mlp_backward_op, dropless_mlp_backward_triton)
