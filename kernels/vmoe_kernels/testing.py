"""What the tests of the kernels and `vmoe doctor` share: routed inputs, error budgets against float64, poisoned memory.

Dims: T tokens, K choices per token, E experts, C slots per expert, N = E * C rows of the buffer, D width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmoe_kernels.common.groups import rows_per_expert
from vmoe_kernels.routing.slots import assign_slots_reference

ROUTINGS = ("random", "ties", "one_expert", "dropped")
# (T, K, E, C, D): single elements, sizes that no tile divides, a group of 8 images of 197 tokens, the widths of V-MoE.
ROUTED_SHAPES = (
    (0, 2, 4, 3, 8),
    (5, 1, 4, 0, 8),
    (1, 1, 1, 1, 1),
    (13, 3, 5, 4, 48),
    (13, 2, 32, 2, 50),
    (67, 2, 5, 41, 8),
    (197 * 8, 1, 32, 52, 16),
    (21, 2, 5, 8, 768),
    (9, 1, 5, 3, 1280),
)


def make_logits(routing: str, num_tokens: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Router logits of one of `ROUTINGS`: random (also for "dropped"), all equal, or all for expert 0.

    Returns:
        (T, E) float32 on the CPU.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}")
    if routing == "ties":
        return torch.zeros(num_tokens, num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    if routing == "one_expert":
        logits[:, 0] += 20.0
    return logits


def make_routed(
    routing: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, *, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of dispatch and combine, routed as one group in vanilla order.

    Args:
        routing: one of `ROUTINGS`; "dropped" has no kept choice.
        shape: (T, K, E, C, D).
        dtype: of `x` and `buffer`.

    Returns:
        x (T, D), buffer (N, D) whose unused rows are NaN, slots (T, K) int32 and gates (T, K) float32.
    """
    num_tokens, num_choices, num_experts, capacity, width = shape
    logits = make_logits(routing, num_tokens, num_experts, seed=seed)
    gates, experts = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    gates, experts = gates[:, :num_choices].contiguous(), experts[:, :num_choices].to(torch.int32).contiguous()
    slots = assign_slots_reference(
        experts,
        gates,
        num_experts=num_experts,
        group_size=max(num_tokens, 1),
        capacity=0 if routing == "dropped" else capacity,
        last_capacity=0,
    )
    make = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(num_tokens, width, generator=make)
    buffer = torch.randn(num_experts * capacity, width, generator=make)
    held = torch.zeros(len(buffer) + 1, dtype=torch.bool).index_fill_(0, slots.long().view(-1), True)[:-1]
    buffer[~held] = torch.nan
    return {
        "x": x.to(device, dtype),
        "buffer": buffer.to(device, dtype),
        "slots": slots.to(device),
        "gates": gates.to(device),
    }


def make_experts(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, bias: bool = True, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor | None]:
    """Weights of experts whose activations have a variance of about 1.

    Args:
        shape: (E, D, H, O).
        dtype: of the weights.
        bias: whether the experts have biases.
        device: where the weights live.
        seed: of the draw.

    Returns:
        fc1_weight (E, H, D), fc1_bias (E, H), fc2_weight (E, O, H) and fc2_bias (E, O); None without biases.
    """
    num_experts, width, hidden, out = shape
    make = torch.Generator().manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(num_experts, *sizes, generator=make) * scale).to(device, dtype)

    return {
        "fc1_weight": draw(hidden, width, scale=width**-0.5),
        "fc1_bias": draw(hidden) if bias else None,
        "fc2_weight": draw(out, hidden, scale=hidden**-0.5),
        "fc2_bias": draw(out) if bias else None,
    }


class Comparison(NamedTuple):
    """How far a result is from the truth; distances are the largest over the tensor."""

    error: float
    """Of the result; infinite where it is no such tensor at all."""
    eager_error: float
    """Of what eager PyTorch computed."""
    allowed: float
    """How far off the result may be."""
    fault: str | None
    """What is wrong, in words, or None."""


def compare(name: str, got: Tensor, eager: Tensor, exact: Tensor, ulps: int = 1) -> Comparison:
    """Whether a result is at most twice as far from the truth as eager PyTorch's is.

    Some units in the last place of the truth's largest element are always allowed: where eager's error is a few
    roundings, twice of it is luck.

    Args:
        name: what the tensor is, for the message.
        got: the result, with the shape and dtype of `eager`.
        eager: what eager PyTorch computed from the same inputs.
        exact: the truth, in float64; `got` must be NaN or infinite exactly where it is.
        ulps: how many units are always allowed.

    Returns:
        Comparison.
    """
    fault, finite = None, exact.isfinite()
    if got.dtype != eager.dtype:
        fault = f"{name} must be {eager.dtype}, got {got.dtype}"
    elif got.shape != eager.shape:
        fault = f"{name} must be {tuple(eager.shape)}, got {tuple(got.shape)}"
    elif not torch.equal(got.isnan(), exact.isnan()) or not torch.equal(got.isfinite(), finite):
        fault = f"{name} must be finite where float64 is, and nowhere else"
    elif not torch.equal(got.double()[exact.isinf()], exact[exact.isinf()]):
        fault = f"{name} must be infinite as float64 is"
    if fault is not None:
        return Comparison(torch.inf, 0.0, 0.0, fault)
    if not finite.any():
        return Comparison(0.0, 0.0, 0.0, None)
    exact = exact[finite]
    error, eager_error = ((tensor[finite].double() - exact).abs().max().item() for tensor in (got, eager))
    allowed = max(2 * eager_error, ulps * torch.finfo(got.dtype).eps * exact.abs().max().item())
    if not error <= allowed:
        fault = f"{name} is off by {error:.3g}; eager PyTorch is off by {eager_error:.3g}, {allowed:.3g} is allowed"
    return Comparison(error, eager_error, allowed, fault)


def assert_within_budget(name: str, got: Tensor, eager: Tensor, exact: Tensor, ulps: int = 1) -> None:
    """Asserts what `compare` asks."""
    fault = compare(name, got, eager, exact, ulps).fault
    assert fault is None, fault


def slots_fault(slots: Tensor, want: Tensor, *, group_size: int, capacity: int, last_capacity: int) -> str | None:
    """What is wrong with slots, in words, or None.

    The kept choices are the twin's, and each holds a row of its own, within its expert, group and capacity; its place
    in the queue is free.

    Args:
        slots: (T, K), the result.
        want: (T, K), those of the eager twin.
        group_size: S.
        capacity: C.
        last_capacity: slots per expert in a smaller last group.

    Returns:
        The fault, or None.
    """
    if slots.dtype != torch.int32 or slots.shape != want.shape:
        return f"slots must be {tuple(want.shape)} int32, got {tuple(slots.shape)} {slots.dtype}"
    if not torch.equal(slots >= 0, want >= 0):
        return f"slots must keep the twin's choices, {int(((slots >= 0) != (want >= 0)).sum())} are others"
    kept = slots[slots >= 0]
    if kept.unique().numel() != kept.numel():
        return f"slots must be unique, {kept.numel() - kept.unique().numel()} are taken twice"
    rows = rows_per_expert(len(slots), group_size, capacity, last_capacity)

    def expert_and_group(row: Tensor) -> Tensor:
        return torch.stack([row // rows, (row % rows).div(capacity, rounding_mode="floor")])

    if not torch.equal(expert_and_group(kept), expert_and_group(want[want >= 0])):
        return "slots must lie in the rows of their expert and group"
    return None


def outputs_and_gradients(
    op: Callable[..., Tensor], inputs: Mapping[str, Any], d_output: Tensor | None = None
) -> dict[str, Tensor]:
    """Runs an op forward and backward.

    Args:
        op: called with the values of `inputs` in order.
        inputs: arguments by name; floating-point tensors among them get a gradient.
        d_output: gradient of the output; by default random, the same for every dtype and device.

    Returns:
        "output", and "d_<name>" for every floating-point input.
    """
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    output = op(*{**inputs, **leaves}.values())
    if d_output is None:
        d_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad(output, list(leaves.values()), d_output.to(output))
    return {"output": output.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, gradients)}}


def compare_with_eager(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Mapping[str, Any], *, ulps: int = 1
) -> dict[str, Comparison]:
    """The output and every gradient of an op beside those of its eager twin, in the same dtype and in float64."""
    eager = outputs_and_gradients(reference, inputs)
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    # The truth must see the gradient as the narrower dtype rounds it.
    d_output = torch.randn(eager["output"].shape, generator=torch.Generator().manual_seed(7))
    exact = outputs_and_gradients(reference, wide, d_output.to(eager["output"]))
    got = outputs_and_gradients(op, inputs)
    return {name: compare(name, tensor, eager[name], exact[name], ulps) for name, tensor in got.items()}


def assert_matches_eager(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Mapping[str, Any], *, ulps: int = 1
) -> None:
    """Asserts that the output and every gradient of an op are within the error budget of its eager twin."""
    for found in compare_with_eager(op, reference, inputs, ulps=ulps).values():
        assert found.fault is None, found.fault


def assert_compiles_and_exports(op: Callable[..., Tensor], inputs: Mapping[str, Any]) -> None:
    """Asserts that an op is one graph, bitwise its own: compiled in output and every gradient, exported in output."""
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got, want = outputs_and_gradients(compiled, inputs), outputs_and_gradients(op, inputs)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())

    class Op(torch.nn.Module):
        def forward(self, *arguments):
            return op(*arguments)

    program = torch.export.export(Op(), tuple(inputs.values()))
    assert torch.equal(program.module()(*inputs.values()), want["output"])


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new allocation with NaN (integers: their largest value), so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def products_of_float32(precision: str) -> Iterator[None]:
    """Products of float32 on a GPU are "ieee" or "tf32" within the block, PyTorch's own and the kernels'."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def forbidden_synchronisation() -> Iterator[None]:
    """Raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def assert_graph_replays(op: Callable[..., Tensor], inputs: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Captures an op's forward and backward in a CUDA graph and asserts that a replay on other data is bitwise right.

    Args:
        op: called with the values of `inputs` in order.
        inputs: what the graph is captured with; tensors among them are overwritten.
        others: of the same shapes; what the graph is replayed with.
    """
    want = outputs_and_gradients(op, others)
    d_output = torch.randn(want["output"].shape, generator=torch.Generator().manual_seed(7)).to(want["output"])
    # Compiling and the allocator's first calls must not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        outputs_and_gradients(op, inputs, d_output)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outputs_and_gradients(op, inputs, d_output)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(others[name])
    graph.replay()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), f"{name} of a graph's replay must equal that of a direct call"
