"""The layer's steps, each answered by whoever can be heard where it is called.

`impl` "portable" is `layers.portable`, for tracers and ONNX; any other is one of `vmoe_kernels`' own. TorchScript,
which compiles functions of tensors and numbers and runs in eval mode, has the registered ops.
"""

import torch
from torch import Tensor

import vmoe_kernels as kernels
from vmoe_kernels import RouterOutput
from vmoe_kernels.common.impl import has_kernels
from vmoe_torch.layers import portable
from vmoe_torch.layers.experts import Weights
from vmoe_torch.layers.groups import Groups


def router(
    x: Tensor,
    weight: Tensor,
    num_selected_experts: int,
    group_size: int,
    noise_std: float,
    seed: Tensor | None,
    impl: str,
) -> RouterOutput:
    """`vmoe_kernels.router`; `portable` gives None for what losses and statistics read."""
    if torch.jit.is_scripting():
        out = torch.ops.vmoe.router(x, weight, num_selected_experts, group_size, noise_std, seed)
        return RouterOutput(out[0], out[1], out[2], out[3], out[4], out[5], out[6])
    if impl == "portable":
        return portable.router(x, weight, num_selected_experts)
    return kernels.router(
        x,
        weight,
        num_selected_experts=num_selected_experts,
        group_size=group_size,
        noise_std=noise_std,
        seed=seed,
        impl=impl,
    )


def assign_slots(
    experts: Tensor, gates: Tensor, num_experts: int, groups: Groups, batch_priority: bool, priority: str, impl: str
) -> Tensor:
    """`vmoe_kernels.assign_slots`."""
    size, capacity, last_capacity = groups.size, groups.capacity, groups.last_capacity
    if torch.jit.is_scripting():
        return torch.ops.vmoe.assign_slots(
            experts, gates, num_experts, size, capacity, last_capacity, batch_priority, priority
        )
    if impl == "portable":
        return portable.assign_slots(experts, gates, num_experts, groups, batch_priority, priority)
    return kernels.assign_slots(
        experts,
        gates,
        num_experts=num_experts,
        group_size=size,
        capacity=capacity,
        last_capacity=last_capacity,
        batch_priority=batch_priority,
        priority=priority,
        impl=impl,
    )


def assign_rows(
    experts: Tensor, gates: Tensor, num_experts: int, groups: Groups, batch_priority: bool, priority: str, impl: str
) -> tuple[Tensor, Tensor | None]:
    """`vmoe_kernels.assign_rows` where `moe_mlp` goes by the choices of the rows; slots alone elsewhere."""
    # Two lines, as TorchScript does not know `has_kernels`.
    if not torch.jit.is_scripting():  # noqa: SIM102
        if impl in ("auto", "triton") and has_kernels(experts.device):
            return kernels.assign_rows(
                experts,
                gates,
                num_experts=num_experts,
                group_size=groups.size,
                capacity=groups.capacity,
                last_capacity=groups.last_capacity,
                batch_priority=batch_priority,
                priority=priority,
                impl=impl,
            )
    return assign_slots(experts, gates, num_experts, groups, batch_priority, priority, impl), None


def assign_dropless_slots(experts: Tensor, num_experts: int, groups: Groups, impl: str) -> tuple[Tensor, Tensor | None]:
    """`vmoe_kernels.assign_dropless_slots`: slots and spans."""
    return kernels.assign_dropless_slots(experts, num_experts=num_experts, group_size=groups.size, impl=impl)


def dispatch(x: Tensor, slots: Tensor, num_rows: int, impl: str) -> Tensor:
    """`vmoe_kernels.dispatch`."""
    if torch.jit.is_scripting():
        return torch.ops.vmoe.dispatch(x, slots, num_rows)
    if impl == "portable":
        return portable.dispatch(x, slots, num_rows)
    return kernels.dispatch(x, slots, num_rows, impl=impl)


def expert_mlp(
    x: Tensor,
    weights: Weights,
    activation: str,
    drop: float,
    seed: Tensor | None,
    impl: str,
) -> Tensor:
    """`vmoe_kernels.expert_mlp`."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    if torch.jit.is_scripting():
        return torch.ops.vmoe.expert_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, drop, seed, False)[
            0
        ]
    if impl == "portable":
        # The eager twin can be recorded as it is.
        return kernels.expert_mlp_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation)
    return kernels.expert_mlp(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation, drop=drop, seed=seed, impl=impl
    )


def combine(buffer: Tensor, slots: Tensor, gates: Tensor, impl: str) -> Tensor:
    """`vmoe_kernels.combine`."""
    if torch.jit.is_scripting():
        return torch.ops.vmoe.combine(buffer, slots, gates)
    if impl == "portable":
        return portable.combine(buffer, slots, gates)
    return kernels.combine(buffer, slots, gates, impl=impl)


def moe_mlp(
    x: Tensor,
    slots: Tensor,
    gates: Tensor,
    weights: Weights,
    rows: int,
    activation: str,
    drop: float,
    seed: Tensor | None,
    impl: str,
    choices: Tensor | None = None,
) -> Tensor:
    """`vmoe_kernels.moe_mlp`: dispatch, experts and combine in one, which has no portable form."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    if torch.jit.is_scripting():
        return torch.ops.vmoe.moe_mlp(
            x, slots, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias, rows, activation, drop, seed, False
        )[0]
    return kernels.moe_mlp(
        x,
        slots,
        gates,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        rows_per_expert=rows,
        activation=activation,
        drop=drop,
        seed=seed,
        choices=choices,
        impl=impl,
    )


def dropless_mlp(
    x: Tensor,
    slots: Tensor,
    spans: Tensor,
    gates: Tensor,
    weights: Weights,
    activation: str,
    drop: float,
    seed: Tensor | None,
    impl: str,
    wire: torch.dtype | None = None,
) -> Tensor:
    """`vmoe_kernels.dropless_mlp`; with `wire`, what goes into and comes out of the experts is rounded to that."""
    settings = {"activation": activation, "drop": drop, "seed": seed, "impl": impl}
    if wire is None:
        return kernels.dropless_mlp(x, slots, spans, gates, *weights, **settings)
    # Every choice as a token of its own, as its output is rounded before its gate meets it.
    choices = torch.arange(slots.numel(), device=x.device, dtype=torch.int32).view(slots.shape)
    copies = x.to(wire).to(x.dtype).repeat_interleave(slots.shape[1], 0)
    slots = slots.view(-1, 1)
    out = kernels.dropless_mlp(copies, slots, spans, torch.ones_like(slots, dtype=gates.dtype), *weights, **settings)
    return kernels.combine(out.to(wire).to(x.dtype), choices, gates, impl=impl)
