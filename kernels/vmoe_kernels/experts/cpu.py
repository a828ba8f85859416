"""The experts on a CPU: rows go through both GEMMs in blocks, so that the activation works on data still in cache.

Dims: E experts, R rows per expert, n rows of a block, D width in, H hidden width, O width out.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_kernels.common.impl import accumulation_dtype
from vmoe_kernels.experts.activations import activate
from vmoe_kernels.experts.types import Activation, ExpertWeights

# Floats of the hidden block that stays in a core's cache between the two GEMMs; benchmarks/layer/on_cpu.py chose it.
_BLOCK_FLOATS = 1 << 20


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the dtype fast; where it does not, PyTorch multiplies one by one."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known:
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, known[dtype])()


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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ weight^T + bias, into memory that is there already: fresh pages cost a CPU more than the activation."""
    # aten's: counters that patch torch's functions would count the rows that happen to be filled.
    if not has_products(out.dtype):
        wide = torch.ops.aten.mm(x.float(), weight.t().float())
        out.copy_(wide if bias is None else wide.add_(bias))
    elif bias is None:
        torch.ops.aten.mm.out(x, weight.t(), out=out)
    else:
        torch.ops.aten.addmm.out(bias, x, weight.t(), out=out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b."""
    if has_products(out.dtype):
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or, where there is no total yet, total = a @ b, which is faster for 16-bit numbers."""
    if first:
        _product(a, b, total)
    elif has_products(total.dtype):
        total.addmm_(a, b)
    else:
        total.copy_(total.float().addmm_(a.float(), b.float()))


def _drop(values: Tensor, keep: Tensor | None, block: slice, drop: float) -> None:
    """Zeroes what is not kept, also what is not finite, and scales the rest in place: one rounding in any dtype."""
    if keep is not None:
        values.masked_fill_(~keep[block], 0.0).mul_(1.0 / (1.0 - drop))


class ExpertOutputs:
    """Runs blocks of rows, and keeps their pre-activation where a backward may come.

    Args:
        weights: of all experts.
        activation: and dropout.
        rows: of an expert at most.
        pre: memory for the pre-activation, (R, H) for each expert, or None; blocks lie packed at the front of each
            expert's part, and the rest is never touched.
    """

    def __init__(
        self, weights: ExpertWeights, activation: Activation, rows: int, pre: Tensor | Sequence[Tensor] | None
    ):
        width = weights.fc1_weight.shape[1]
        self.weights, self.activation, self.pre = weights, activation, pre
        self.scratch = weights.fc1_weight.new_empty(2 if pre is None else 1, largest_block(rows, width), width)

    def fill(self, out: Tensor, expert: int, block: slice, x: Tensor, keep: Tensor | None) -> None:
        """One block of an expert: x (n, D) fills out (n, O); keep (R, H) says what dropout leaves of all its rows."""
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.weights.of(expert)
        hidden, *others = self.scratch[:, : block.stop - block.start]
        pre = others[0] if others else self.pre[expert][block]
        _linear(x, fc1_weight, fc1_bias, pre)
        activate(self.activation.name, pre, hidden)
        _drop(hidden, keep, block, self.activation.drop)
        _linear(hidden, fc2_weight, fc2_bias, out)


class ExpertGradients:
    """The weight gradients of all experts, accumulated over blocks of rows; hidden activations are recomputed."""

    def __init__(self, weights: ExpertWeights, activation: Activation, pre: Tensor | Sequence[Tensor]):
        self.weights, self.activation, self.pre = weights, activation, pre
        self.sums = weights.new_gradients()
        for d_bias in (self.sums.fc1_bias, self.sums.fc2_bias):
            d_bias.zero_()
        self.begun: set[int] = set()
        self.scratch: Tensor | None = None

    def add(
        self, expert: int, block: slice, x: Tensor, d_out: Tensor, keep: Tensor | None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One block of an expert.

        Args:
            expert: which one.
            block: where its pre-activation lies.
            x: (n, D) inputs.
            d_out: (n, O) gradient of the expert's output, or of gate * output where a gate is given (overwritten).
            keep: (R, H) what dropout left of all the expert's rows, or None.
            gate: (n, 1) combine weight, in the dtype that accumulates.

        Returns:
            (n, D) gradient of x, and (n,) gradient of the gate, <d_out, output>. But in float16 without
            the output itself: <d_out W2, hidden> + <d_out, b2>.
        """
        fc1_weight, _, fc2_weight, fc2_bias = self.weights.of(expert)
        d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias = self.sums
        (name, drop, _), pre = self.activation, self.pre[expert][block]
        if self.scratch is None or self.scratch.shape[1] < len(x):
            self.scratch = pre.new_empty(3 if pre.dtype == accumulation_dtype(pre.dtype) else 4, *pre.shape)
        hidden, d_hidden, slope, *work = self.scratch[:, : len(x)]
        # A product that lacks its gate may leave the range of float16: the output itself is needed then.
        narrow = d_out.dtype == torch.float16
        activate(name, pre, hidden, slope, None if narrow else gate)
        _drop(hidden, keep, block, drop)
        d_gate = None
        if gate is not None and narrow:
            out = torch.empty_like(d_out)
            _linear(hidden, fc2_weight, fc2_bias, out)
            d_gate = torch.linalg.vecdot(d_out.to(gate.dtype), out.to(gate.dtype))
            d_out.mul_(gate)
        _product(d_out, fc2_weight, d_hidden)
        if gate is not None and d_gate is None:
            if work:
                d_gate = torch.mul(d_hidden, hidden, out=work[0]).sum(-1, dtype=gate.dtype)
            else:
                d_gate = torch.linalg.vecdot(d_hidden, hidden)
            if fc2_bias is not None:
                d_gate += d_out.to(gate.dtype) @ fc2_bias.to(gate.dtype)
            # That of the hidden rows is in the slope.
            d_out.mul_(gate)
        # An expert's first block overwrites what the memory held.
        first = expert not in self.begun
        self.begun.add(expert)
        _add_product(d_fc2_weight[expert], d_out.t(), hidden, first)
        _drop(d_hidden, keep, block, drop)
        d_hidden.mul_(slope)
        _add_product(d_fc1_weight[expert], d_hidden.t(), x, first)
        for d_bias, d_rows in ((d_fc1_bias, d_hidden), (d_fc2_bias, d_out)):
            if d_bias.numel():
                d_bias[expert] += d_rows.sum(0)
        d_x = torch.empty_like(x)
        _product(d_hidden, fc1_weight, d_x)
        return d_x, d_gate

    def results(self) -> ExpertWeights:
        """All of them; those of an expert without rows are 0."""
        for expert in set(range(len(self.pre))) - self.begun:
            self.sums.fc1_weight[expert].zero_()
            self.sums.fc2_weight[expert].zero_()
        return self.sums


class Filled(NamedTuple):
    """The filled rows of one expert, in order."""

    expert: int
    """Which one."""
    choices: Tensor
    """(n,) int64 flat choices t * K + k that hold them."""
    tokens: Tensor
    """(n,) int64 tokens of the choices."""
    keep: Tensor | None
    """(n, H) bool, what dropout keeps of their hidden activations, or None without dropout."""


def gated_outputs(
    x: Tensor, gates: Tensor, y: Tensor, filled: Iterable[Filled], outputs: ExpertOutputs, rows: int
) -> None:
    """Adds gate * output of every filled row to its token.

    Args:
        x: (T, D) tokens.
        gates: (T, K).
        y: (T, O) in the dtype that accumulates.
        filled: of each expert.
        outputs: runs them.
        rows: of an expert at most.
    """
    width = outputs.weights.fc1_weight.shape[1]
    weight = gates.reshape(-1, 1).to(y.dtype)
    largest = largest_block(rows, width)
    inputs, outs = x.new_empty(largest, x.shape[1]), x.new_empty(largest, y.shape[1])
    for expert, choices, tokens, keep in filled:
        for block in row_blocks(len(choices), width):
            x_rows, out = (memory[: block.stop - block.start] for memory in (inputs, outs))
            torch.index_select(x, 0, tokens[block], out=x_rows)
            outputs.fill(out, expert, block, x_rows, keep)
            y.index_add_(0, tokens[block], out.to(y.dtype).mul_(weight.index_select(0, choices[block])))


def gated_gradients(
    d_y: Tensor, x: Tensor, gates: Tensor, filled: Iterable[Filled], gradients: ExpertGradients
) -> tuple[Tensor, Tensor]:
    """The way back: the gradients of x (T, D) and of the gates (T, K); those of the weights wait in `gradients`."""
    width = gradients.weights.fc1_weight.shape[1]
    d_x = torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    d_gates = gates.new_zeros(gates.shape)
    weight = gates.reshape(-1, 1).to(d_x.dtype)
    for expert, choices, tokens, keep in filled:
        for block in gradient_blocks(len(choices), width, x.dtype):
            x_rows, d_out = (each.index_select(0, tokens[block]) for each in (x, d_y))
            d_rows, d_gate = gradients.add(expert, block, x_rows, d_out, keep, weight.index_select(0, choices[block]))
            d_x.index_add_(0, tokens[block], d_rows.to(d_x.dtype))
            d_gates.view(-1)[choices[block]] = d_gate.to(gates.dtype)
    return d_x.to(x.dtype), d_gates
