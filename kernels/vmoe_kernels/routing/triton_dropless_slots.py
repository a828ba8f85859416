"""Dropless slots on a GPU: the counting rank of `triton_slots_sort`, with parts as long as their experts need.

Dims: T tokens in groups of S (the last one may be smaller), K choices per token, E experts.
"""

import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_integer, check_rows, check_triton_routing
from vmoe_kernels.common.groups import dropless_rows
from vmoe_kernels.routing.triton_slots_sort import count_choices, place_choices, scan_counts


@triton.jit(do_not_specialize=["tile"])
def _spans_kernel(
    totals_ptr,  # (E,) int32
    spans_ptr,  # (2, E) int32
    tile,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program owns all: where the rows of each expert begin, at whole tiles, and end."""
    experts = tl.arange(0, BLOCK_E)
    sizes = tl.load(totals_ptr + experts, mask=experts < E, other=0)
    padded = (sizes + tile - 1) // tile * tile
    starts = tl.cumsum(padded, axis=0) - padded
    tl.store(spans_ptr + experts, starts, mask=experts < E)
    tl.store(spans_ptr + E + experts, starts + sizes, mask=experts < E)


def assign_dropless_slots_triton(
    experts: Tensor, num_experts: int, group_size: int, tile: int
) -> tuple[Tensor, Tensor]:
    """Launcher of `vmoe::assign_dropless_slots`: no host synchronisation, no atomics, two runs agree bitwise."""
    check_triton_routing("slots", num_experts, experts.shape[1], "the number of choices per token")
    check_integer("tile", tile, 1, "at least 1 row")
    check_rows(dropless_rows(experts.numel(), num_experts, tile))
    spans = experts.new_empty(2, num_experts)
    if experts.numel() == 0:
        return experts.new_empty(experts.shape), spans.zero_()
    experts = experts.contiguous()
    counts = count_choices(experts, None, num_experts, group_size)
    totals = experts.new_empty(num_experts)
    # The groups' queues follow each other, as if they were one.
    scan_counts(counts.flatten(0, 2).unsqueeze(0), totals)
    block = max(2, triton.next_power_of_2(num_experts))
    _spans_kernel[(1,)](totals, spans, tile, E=num_experts, BLOCK_E=block, num_warps=4)
    return place_choices(experts, None, counts, group_size, starts=spans), spans
