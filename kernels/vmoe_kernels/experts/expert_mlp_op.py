"""Expert MLP: out[e] = activation(x[e] @ fc1[e]^T + b1[e]) @ fc2[e]^T + b2[e], one MLP per expert.

The backward keeps x and the pre-activation only; everything else is recomputed. On CPU, rows go through both GEMMs in
blocks, so that the activation works on data that is still in cache.

Dims: E experts, R rows per expert, D width in, H hidden width, O width out.
Over 400 lines: the twin, the CPU's two directions, the ops and the public function are one op's, in that order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_kernels.common.checks import check_draws, check_number, check_rows, check_seed
from vmoe_kernels.common.flops import mlp_flops
from vmoe_kernels.common.impl import (
    HAS_TRITON,
    check_dtypes,
    check_floating,
    no_autocast,
    register_triton,
    use_reference,
)
from vmoe_kernels.common.philox import dropout_keep
from vmoe_kernels.common.transforms import differs_backward, twin_gradients
from vmoe_kernels.experts.activations import FORWARD, activate, chain, check_activation

# Floats of the hidden block that stays in a core's cache between the two GEMMs; benchmarks/layer/on_cpu.py chose it.
_BLOCK_FLOATS = 1 << 20


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
    hidden = x @ fc1_weight.transpose(1, 2)
    if fc1_bias is not None:
        hidden = hidden + fc1_bias.unsqueeze(1)
    hidden = FORWARD[activation](hidden)
    if drop > 0:
        keep = torch.stack([dropout_keep(seed, e, tuple(hidden.shape[1:]), drop) for e in range(x.shape[0])])
        hidden = torch.where(keep, hidden / (1.0 - drop), 0.0)
    out = hidden @ fc2_weight.transpose(1, 2)
    return out if fc2_bias is None else out + fc2_bias.unsqueeze(1)


def row_blocks(rows: int, hidden: int) -> Iterator[slice]:
    """Even blocks of 0..rows whose hidden activations stay in a CPU's cache."""
    blocks = max(-(-rows * hidden // _BLOCK_FLOATS), 1)
    step = -(-rows // blocks)
    for start in range(0, rows, max(step, 1)):
        yield slice(start, min(start + step, rows))


def gradient_blocks(rows: int, hidden: int, dtype: torch.dtype) -> Iterator[slice]:
    """`row_blocks`, but one for 16-bit rows, whose weight gradients would be rounded after every block."""
    if dtype in (torch.float32, torch.float64):
        return row_blocks(rows, hidden)
    return iter([slice(0, rows)] if rows else [])


def largest_block(rows: int, hidden: int) -> int:
    """Rows that no block of `row_blocks` exceeds, for any number of rows up to this one."""
    return min(rows, -(-_BLOCK_FLOATS // max(hidden, 1)))


def linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ weight^T + bias, into memory that is there already: fresh pages cost a CPU more than the activation."""
    # aten's: counters that patch torch's functions would count the rows that happen to be filled.
    if bias is None:
        torch.ops.aten.mm.out(x, weight.t(), out=out)
    else:
        torch.ops.aten.addmm.out(bias, x, weight.t(), out=out)


def dropout(values: Tensor, keep: Tensor, drop: float) -> None:
    """Zeroes what is not kept, also what is not finite, and scales the rest in place: one rounding in any dtype."""
    values.masked_fill_(~keep, 0.0).mul_(1.0 / (1.0 - drop))


def forward_rows(
    x: Tensor,
    pre: Tensor,
    hidden: Tensor,
    out: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: str,
    keep: Tensor | None = None,
    drop: float = 0.0,
) -> None:
    """One expert, a block of n rows: x (n, D) fills pre (n, H), hidden (n, H) and out (n, O)."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    linear_out(x, fc1_weight, fc1_bias, pre)
    activate(activation, pre, hidden)
    if keep is not None:
        dropout(hidden, keep, drop)
    linear_out(hidden, fc2_weight, fc2_bias, out)


class ExpertGradients:
    """The weight gradients of all experts, accumulated over blocks of rows; hidden activations are recomputed."""

    def __init__(self, weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None], activation: str, drop: float):
        self.weights = weights
        self.activation, self.drop = activation, drop
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        self.d_fc1_weight = fc1_weight.new_empty(fc1_weight.shape)
        self.d_fc2_weight = fc2_weight.new_empty(fc2_weight.shape)
        self.d_fc1_bias = fc1_weight.new_zeros(0 if fc1_bias is None else fc1_bias.shape)
        self.d_fc2_bias = fc2_weight.new_zeros(0 if fc2_bias is None else fc2_bias.shape)
        self.scratch: Tensor | None = None

    def add_rows(
        self,
        expert: int,
        first: bool,
        x: Tensor,
        pre: Tensor,
        d_out: Tensor,
        gate: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A block of n rows of one expert.

        Args:
            expert: which one.
            first: whether it is the expert's first block, which overwrites its weight gradients.
            x: (n, D) inputs.
            pre: (n, H) saved pre-activation.
            d_out: (n, O) gradient of the expert's output, or of gate * output where a gate is given (overwritten).
            gate: (n, 1) combine weight, in the dtype that accumulates.
            keep: (n, H) dropout mask.

        Returns:
            (n, D) gradient of x, and (n,) gradient of the gate, <d_out, output>. In float32 and float64 without the
            output itself: <d_out W2, hidden> + <d_out, b2>.
        """
        fc1_weight, _, fc2_weight, fc2_bias = self.weights
        rows = x.shape[0]
        if self.scratch is None or self.scratch.shape[1] < rows:
            self.scratch = pre.new_empty(3, rows, pre.shape[1])
        hidden, d_hidden, work = self.scratch[:, :rows]
        activate(self.activation, pre, hidden)
        if keep is not None:
            dropout(hidden, keep, self.drop)
        d_gate = None
        if gate is not None and gate.dtype != d_out.dtype:
            # 16-bit rows: a product that lacks its gate rounds once more, and may leave float16's range.
            out = torch.empty_like(d_out)
            linear_out(hidden, fc2_weight[expert], None if fc2_bias is None else fc2_bias[expert], out)
            d_gate = torch.linalg.vecdot(d_out.to(gate.dtype), out.to(gate.dtype))
            d_out.mul_(gate)
        torch.mm(d_out, fc2_weight[expert], out=d_hidden)
        if gate is not None and d_gate is None:
            d_gate = torch.linalg.vecdot(d_hidden, hidden)
            if fc2_bias is not None:
                d_gate += d_out @ fc2_bias[expert]
            d_out.mul_(gate)
            d_hidden.mul_(gate)
        beta = 0 if first else 1
        self.d_fc2_weight[expert].addmm_(d_out.t(), hidden, beta=beta)
        if keep is not None:
            dropout(d_hidden, keep, self.drop)
        # The hidden activations have served: their memory is free.
        chain(self.activation, pre, d_hidden, (hidden, work))
        self.d_fc1_weight[expert].addmm_(d_hidden.t(), x, beta=beta)
        if self.d_fc1_bias.numel():
            self.d_fc1_bias[expert] += d_hidden.sum(0)
        if self.d_fc2_bias.numel():
            self.d_fc2_bias[expert] += d_out.sum(0)
        return d_hidden @ fc1_weight[expert], d_gate

    def no_rows(self, expert: int) -> None:
        """An expert without rows has zero gradients."""
        self.d_fc1_weight[expert].zero_()
        self.d_fc2_weight[expert].zero_()

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of fc1 weight and bias, fc2 weight and bias; an absent bias has an empty one."""
        return self.d_fc1_weight, self.d_fc1_bias, self.d_fc2_weight, self.d_fc2_bias


def weights_of(
    expert: int, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The weights and biases of one expert."""
    return (
        fc1_weight[expert],
        None if fc1_bias is None else fc1_bias[expert],
        fc2_weight[expert],
        None if fc2_bias is None else fc2_bias[expert],
    )


@torch.library.custom_op("vmoe::expert_mlp", mutates_args=(), device_types="cpu")
@no_autocast
def _expert_mlp_op(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    drop: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    num_experts, rows, _ = x.shape
    width = fc1_weight.shape[1]
    out = x.new_empty(num_experts, rows, fc2_weight.shape[1])
    pre = x.new_empty(num_experts, rows if save else 0, width)
    scratch = x.new_empty(1 if save else 2, largest_block(rows, width), width)
    for e in range(num_experts):
        keep = dropout_keep(seed, e, (rows, width), drop) if drop > 0 else None
        for block in row_blocks(rows, width):
            memory = scratch[:, : block.stop - block.start]
            forward_rows(
                x[e, block],
                pre[e, block] if save else memory[1],
                memory[0],
                out[e, block],
                weights_of(e, fc1_weight, fc1_bias, fc2_weight, fc2_bias),
                activation,
                None if keep is None else keep[block],
                drop,
            )
    return out, pre


@_expert_mlp_op.register_fake
def _(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed, save):
    num_experts, rows, _ = x.shape
    return (
        x.new_empty((num_experts, rows, fc2_weight.shape[1])),
        x.new_empty((num_experts, rows if save else 0, fc1_weight.shape[1])),
    )


@torch.library.custom_op("vmoe::expert_mlp_backward", mutates_args=(), device_types="cpu")
@no_autocast
def _expert_mlp_backward_op(
    d_out: Tensor,
    x: Tensor,
    pre: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    drop: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts, rows, _ = x.shape
    width = fc1_weight.shape[1]
    gradients = ExpertGradients((fc1_weight, fc1_bias, fc2_weight, fc2_bias), activation, drop)
    d_x = x.new_empty(x.shape)
    for e in range(num_experts):
        if rows == 0:
            gradients.no_rows(e)
        keep = dropout_keep(seed, e, (rows, width), drop) if drop > 0 else None
        for block in gradient_blocks(rows, width, x.dtype):
            mask = None if keep is None else keep[block]
            first = block.start == 0
            d_x[e, block], _ = gradients.add_rows(e, first, x[e, block], pre[e, block], d_out[e, block], keep=mask)
    return (d_x, *gradients.results())


@_expert_mlp_backward_op.register_fake
def _(d_out, x, pre, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed):
    return (x.new_empty(x.shape), *fake_weight_gradients(fc1_weight, fc1_bias, fc2_weight, fc2_bias))


def fake_weight_gradients(fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """Shapes of `ExpertGradients.results`."""
    return (
        fc1_weight.new_empty(fc1_weight.shape),
        fc1_weight.new_empty(0 if fc1_bias is None else fc1_bias.shape),
        fc2_weight.new_empty(fc2_weight.shape),
        fc2_weight.new_empty(0 if fc2_bias is None else fc2_bias.shape),
    )


def _setup_context(ctx, inputs, output):
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed, _ = inputs
    ctx.save_for_backward(x, output[1], fc1_weight, fc1_bias, fc2_weight, fc2_bias, seed)
    ctx.mark_non_differentiable(output[1])
    # Else autograd would fill a zero gradient of the size of the pre-activation.
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.drop = activation, drop


def _backward(ctx, d_out, _pre):
    if d_out is None:
        return (None,) * 9
    x, pre, fc1_weight, fc1_bias, fc2_weight, fc2_bias, seed = ctx.saved_tensors
    if differs_backward():
        settings = {"activation": ctx.activation, "drop": ctx.drop, "seed": seed}
        inputs = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        gradients = twin_gradients(lambda *inputs: expert_mlp_reference(*inputs, **settings), inputs, (d_out,))
        return (*gradients, None, None, None, None)
    d_x, d_fc1, d_b1, d_fc2, d_b2 = torch.ops.vmoe.expert_mlp_backward(
        d_out.contiguous(), x, pre, fc1_weight, fc1_bias, fc2_weight, fc2_bias, ctx.activation, ctx.drop, seed
    )
    d_b1 = None if fc1_bias is None else d_b1
    d_b2 = None if fc2_bias is None else d_b2
    return d_x, d_fc1, d_b1, d_fc2, d_b2, None, None, None, None


_expert_mlp_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vmoe.expert_mlp)
def _expert_mlp_flops(x_shape, fc1_shape, b1_shape, fc2_shape, *_, **__) -> int:
    return mlp_flops(x_shape[0] * x_shape[1], fc1_shape, fc2_shape)


@register_flop_formula(torch.ops.vmoe.expert_mlp_backward)
def _expert_mlp_backward_flops(d_out_shape, x_shape, pre_shape, fc1_shape, b1_shape, fc2_shape, *_, **__) -> int:
    return 2 * mlp_flops(x_shape[0] * x_shape[1], fc1_shape, fc2_shape)


def check_expert_weights(
    width: int, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> None:
    """Expert weights are (E, H, D), (E, H), (E, O, H), (E, O)."""
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


def check_dropout(drop: float, seed: Tensor | None, device: torch.device, elements: int) -> float:
    """A dropout probability comes with a Philox key; an expert has so many elements to drop."""
    drop = check_number("drop", drop, "in [0, 1)", 0.0, 1.0)
    if drop > 0:
        check_seed(seed, device, "drop > 0")
        check_draws("rows times hidden width of an expert", elements)
    return drop


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, so that what it needs must be kept."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    check_dtypes(x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    check_expert_weights(x.shape[2], fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_activation(activation)
    check_rows(x.shape[0] * x.shape[1])
    drop = check_dropout(drop, seed, x.device, x.shape[1] * fc1_weight.shape[1])
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if use_reference(impl, x, *weights):
        return expert_mlp_reference(x, *weights, activation=activation, drop=drop, seed=seed)
    return torch.ops.vmoe.expert_mlp(x, *weights, activation, drop, seed, wants_grad(x, *weights))[0]


if HAS_TRITON:
    from vmoe_kernels.experts.triton_expert_mlp import expert_mlp_backward_triton, expert_mlp_triton

    register_triton(_expert_mlp_op, expert_mlp_triton)
    register_triton(_expert_mlp_backward_op, expert_mlp_backward_triton)
