"""Bytes that a layer keeps for its backward, counted on fake tensors: exact, at any size, on any machine."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vmoe_kernels as kernels
from benchmarks.harness.cases import Case


@functools.cache
def saved_bytes(case: Case, impl: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of routing and the MLP of one layer in training, without its weights; each storage counts once.

    Args:
        case: the shape.
        impl: "auto" for the ops of this project, "reference" for eager PyTorch.
        dtype: of tokens and weights.
    """
    with FakeTensorMode():
        return count_saved(_layer(case, impl, dtype))


def count_saved(call: Callable[[list[Tensor]], Tensor]) -> int:
    """Bytes of all storages that autograd keeps for a call, but for the weights that it appends to the list it gets."""
    kept: dict[int, int] = {}
    weights: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(weights)
    for weight in weights:
        kept.pop(weight.untyped_storage()._cdata, None)
    # The graph, and with it every storage, lives until here, so that no address is seen twice.
    del out
    return sum(kept.values())


def _layer(case: Case, impl: str, dtype: torch.dtype) -> Callable[[list[Tensor]], Tensor]:
    def call(weights: list[Tensor]) -> Tensor:
        def leaf(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype).requires_grad_()

        experts, width, hidden = case.num_experts, case.width, case.hidden
        x = leaf(case.num_tokens, width)
        router, fc1_weight, fc1_bias = leaf(experts, width), leaf(experts, hidden, width), leaf(experts, hidden)
        fc2_weight, fc2_bias = leaf(experts, width, hidden), leaf(experts, width)
        weights += [router, fc1_weight, fc1_bias, fc2_weight, fc2_bias]
        routing = kernels.route(
            x,
            router,
            num_selected_experts=case.num_selected,
            capacity=case.capacity,
            group_size=case.group_size,
            batch_priority=True,
            impl=impl,
        )
        return kernels.moe_mlp(
            x,
            routing.slots,
            routing.gates,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            rows_per_expert=case.rows,
            impl=impl,
        )

    return call
