"""Every op on tensors that do not lie in memory row by row, the same on the CPU and under the interpreter."""

import torch
from torch import Tensor
from torch.library import opcheck

from vmoe_kernels import assign_dropless_slots
from vmoe_kernels.common.groups import dropless_rows
from vmoe_kernels.common.impl import row_tile
from vmoe_kernels.testing import make_experts, make_routed

# (T, K, E, R, D) and H
ROUTED, HIDDEN = (9, 2, 5, 3, 12), 10
OPS = (
    "router",
    "router_backward",
    "assign_slots",
    "assign_rows",
    "dispatch",
    "dispatch_backward",
    "combine",
    "combine_backward",
    "expert_mlp",
    "expert_mlp_backward",
    "moe_mlp",
    "moe_mlp_backward",
    "assign_dropless_slots",
    "dropless_mlp",
    "dropless_mlp_backward",
)


def arguments(op: str) -> tuple:
    """Contiguous arguments of `torch.ops.vmoe.<op>`."""
    num_tokens, num_choices, num_experts, rows, width = ROUTED
    routed = make_routed("random", ROUTED, torch.float32)
    x, slots, gates, buffer = (routed[name] for name in ("x", "slots", "gates", "buffer"))
    buffer = buffer.nan_to_num()
    data, pre = buffer.view(num_experts, rows, width), torch.randn(num_experts, rows, HIDDEN)
    experts = torch.randint(num_experts, (num_tokens, num_choices), dtype=torch.int32)
    router, logits = torch.randn(num_experts, width), torch.randn(num_tokens, num_experts)
    per_group = torch.randn(3, num_experts)
    dropless = assign_dropless_slots(experts, num_experts=num_experts)
    filled = torch.randn(dropless_rows(experts.numel(), num_experts, row_tile(x.device)), HIDDEN)
    weights = tuple(make_experts((num_experts, width, HIDDEN, width), torch.float32).values())
    settings = ("gelu", 0.0, None)
    return {
        "router": (x, router, num_choices, 4, 0.0, None),
        "router_backward": (x, router, logits, experts, None, gates, logits, per_group, None, per_group, 4, 0.0),
        "assign_slots": (experts, gates, num_experts, 4, 2, 2, True, "max"),
        "assign_rows": (experts, gates, num_experts, 4, 2, 2, True, "max"),
        "dispatch": (x, slots, num_experts * rows),
        "dispatch_backward": (buffer, slots),
        "combine": (buffer, slots, gates),
        "combine_backward": (x, buffer, slots, gates),
        "expert_mlp": (data, *weights, *settings, False),
        "expert_mlp_backward": (data, data, pre, *weights, *settings),
        "moe_mlp": (x, slots, gates, *weights, rows, *settings, False),
        "moe_mlp_backward": (x, x, slots, gates, pre, *weights, rows, *settings),
        "assign_dropless_slots": (experts, num_experts, 4, 16),
        "dropless_mlp": (x, *dropless, gates, *weights, *settings, False),
        "dropless_mlp_backward": (x, x, *dropless, gates, filled, *weights, *settings),
    }[op]


def transposed_memory(values: tuple) -> tuple:
    """The same values; every matrix lies column by column."""
    return tuple(
        value.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(value, Tensor) else value for value in values
    )


def check_strides(op: str) -> None:
    """Results are those of contiguous arguments, and have the strides that a compiler was told."""
    torch.manual_seed(0)
    call, plain = getattr(torch.ops.vmoe, op).default, arguments(op)
    strided = transposed_memory(plain)
    assert not all(value.is_contiguous() for value in strided if isinstance(value, Tensor))
    got, want = call(*strided), call(*plain)
    for ours, tensor in zip(*((each,) if isinstance(each, Tensor) else each for each in (got, want))):
        torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-5)
    opcheck(call, strided, test_utils="test_faketensor")
