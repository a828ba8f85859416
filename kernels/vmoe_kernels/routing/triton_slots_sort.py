"""Triton kernels of design A of the slots: sort the priorities, then rank by counting.

Dims: T tokens in G groups of S (the last one may be smaller), K choices per token, E experts, C slots.
The queue of a group is rank-major: K runs of its S tokens in priority order, cut into blocks. Each block counts its
choices per expert, the counts of a group are summed up to each block, and a choice's place is what came before its
block plus what came before it in the block. PyTorch's stable sort orders the tokens; vanilla needs none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.groups import num_groups, split_groups

_BLOCK_KEYS, _BLOCK_N, _BLOCK_ROWS, _BLOCK_E = 1024, 128, 64, 32


@triton.jit
def priority_keys(gates_ptr, tokens, mask, K: tl.constexpr, SUM: tl.constexpr):
    """int32 keys in the order of the tokens' priorities; NaN is -Inf, and the two zeros tie. Masked tokens get 0."""
    priority = tl.load(gates_ptr + tokens * K, mask=mask, other=0.0).to(tl.float32)
    if SUM:
        for k in tl.static_range(1, K):
            priority += tl.load(gates_ptr + tokens * K + k, mask=mask, other=0.0).to(tl.float32)
        # As PyTorch rounds a sum of narrower gates.
        priority = priority.to(gates_ptr.dtype.element_ty).to(tl.float32)
    priority = tl.where(priority != priority, float("-inf"), priority)
    priority = tl.where(priority == 0.0, 0.0, priority)
    bits = priority.to(tl.int32, bitcast=True)
    # Negative floats order backwards as integers.
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["num_tokens"])
def _sort_keys_kernel(
    gates_ptr,  # (T, K) floating
    keys_ptr,  # (T,) int32, ascending as priorities descend
    num_tokens,
    K: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a block of tokens."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < num_tokens
    tl.store(keys_ptr + tokens, ~priority_keys(gates_ptr, tokens, mask, K, SUM), mask=mask)


@triton.jit
def _queued(order_ptr, group, group_size, size, places):
    """The tokens that stand at places of a group's queue."""
    tokens = group * group_size + places
    if order_ptr is not None:
        tokens = group * group_size + tl.load(order_ptr + tokens, mask=places < size, other=0)
    return tokens


@triton.jit(do_not_specialize=["num_tokens", "group_size", "blocks_per_group"])
def _count_kernel(
    experts_ptr,  # (T, K) int32
    order_ptr,  # (T,) int64 place in the group of each token in priority order, or None
    counts_ptr,  # (G, K, blocks_per_group, E) int32
    num_tokens,
    group_size,
    blocks_per_group,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program owns one block of the queue of one choice rank of one group: how many want each expert."""
    block, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = block // blocks_per_group
    size = tl.minimum(num_tokens - group * group_size, group_size)
    places = (block % blocks_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = _queued(order_ptr, group, group_size, size, places)
    wanted = tl.load(experts_ptr + tokens * K + k, mask=places < size, other=0)
    experts = tl.arange(0, BLOCK_E)
    # A choice of no expert, which only dropless slots have, is -1.
    counts = tl.histogram(wanted, BLOCK_E, mask=(places < size) & (wanted >= 0))
    row = (group * K + k) * blocks_per_group + block % blocks_per_group
    tl.store(counts_ptr + row * E + experts, counts, mask=experts < E)


@triton.jit(do_not_specialize=["rows_per_group"])
def _scan_kernel(
    counts_ptr,  # (G, rows_per_group, E) int32: counts, then what came before
    totals_ptr,  # (G, E) int32, or None
    rows_per_group,
    E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program owns BLOCK_E experts of one group: exclusive sums over its blocks in queue order, in place."""
    group = tl.program_id(0).to(tl.int64)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, rows_per_group, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        pointers = counts_ptr + (group * rows_per_group + rows)[:, None] * E + experts[None, :]
        mask = (rows < rows_per_group)[:, None] & (experts < E)[None, :]
        counts = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        before += tl.sum(counts, axis=0)
    if totals_ptr is not None:
        tl.store(totals_ptr + group * E + experts, before, mask=experts < E)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "group_size",
        "blocks_per_group",
        "capacity",
        "last_capacity",
        "rows_per_expert",
    ]
)
def _place_kernel(
    experts_ptr,  # (T, K) int32
    order_ptr,  # (T,) int64 or None
    counts_ptr,  # (G, K, blocks_per_group, E) int32: what came before each block
    starts_ptr,  # (E,) int32 first row of each expert, where none is full, or None
    slots_ptr,  # (T, K) int32
    num_tokens,
    group_size,
    blocks_per_group,
    capacity,
    last_capacity,
    rows_per_expert,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns one block of the queue of one choice rank of one group, and writes its slots."""
    block, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = block // blocks_per_group
    size = tl.minimum(num_tokens - group * group_size, group_size)
    first = (block % blocks_per_group) * BLOCK_N
    places = first + tl.arange(0, BLOCK_N)
    tokens = _queued(order_ptr, group, group_size, size, places)
    experts = tl.load(experts_ptr + tokens * K + k, mask=places < size, other=-1)
    # The experts again, along the other axis: each place against those before it.
    others = first + tl.arange(0, BLOCK_N)
    other_tokens = _queued(order_ptr, group, group_size, size, others)
    other_experts = tl.load(experts_ptr + other_tokens * K + k, mask=others < size, other=-1)
    earlier = (other_experts[None, :] == experts[:, None]) & (others[None, :] < places[:, None])
    row = (group * K + k) * blocks_per_group + block % blocks_per_group
    before = tl.load(counts_ptr + row * E + experts, mask=experts >= 0, other=0)
    place = before + tl.sum(earlier.to(tl.int32), axis=1)
    if starts_ptr is None:
        limit = tl.where(size < group_size, last_capacity, capacity)
        slot = experts.to(tl.int64) * rows_per_expert + group * capacity + place
        kept = place < limit
    else:
        kept = experts >= 0
        slot = tl.load(starts_ptr + experts, mask=kept, other=0) + place
    tl.store(slots_ptr + tokens * K + k, tl.where(kept, slot, -1).to(tl.int32), mask=places < size)


def _priority_order(gates: Tensor, group_size: int, use_sum: bool) -> Tensor:
    """(T,) int64: the place in its group of the token of each rank by priority, ties by position."""
    num_tokens, num_choices = gates.shape
    keys = torch.empty(num_tokens, device=gates.device, dtype=torch.int32)
    _sort_keys_kernel[(triton.cdiv(num_tokens, _BLOCK_KEYS),)](
        gates, keys, num_tokens, K=num_choices, SUM=use_sum, BLOCK=_BLOCK_KEYS, num_warps=4
    )
    order = torch.empty(num_tokens, device=gates.device, dtype=torch.int64)
    for tokens, groups in split_groups(num_tokens, group_size):
        if tokens.start < tokens.stop:
            part = keys[tokens].view(groups, -1)
            torch.sort(part, dim=1, stable=True, out=(torch.empty_like(part), order[tokens].view(groups, -1)))
    return order


def _blocks_per_group(experts: Tensor, group_size: int) -> int:
    return triton.cdiv(min(group_size, experts.shape[0]), _BLOCK_N)


def count_choices(experts: Tensor, order: Tensor | None, num_experts: int, group_size: int) -> Tensor:
    """How many want each expert, for each block of a group's queue.

    Args:
        experts: (T, K) int32, contiguous, T at least 1.
        order: (T,) int64 place in its group of the token of each rank, or None for position order.
        num_experts: E.
        group_size: S.

    Returns:
        (G, K, blocks, E) int32.
    """
    num_tokens, num_choices = experts.shape
    groups, blocks = num_groups(num_tokens, group_size), _blocks_per_group(experts, group_size)
    counts = experts.new_empty((groups, num_choices, blocks, num_experts))
    block_e = max(2, triton.next_power_of_2(num_experts))
    _count_kernel[(groups * blocks, num_choices)](
        experts, order, counts, num_tokens, group_size, blocks,
        E=num_experts, K=num_choices, BLOCK_N=_BLOCK_N, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return counts


def scan_counts(counts: Tensor, totals: Tensor | None = None) -> None:
    """Turns (G, rows, E) counts into what came before each row, in place; the sums of all rows go to totals (G, E)."""
    groups, rows, num_experts = counts.shape
    _scan_kernel[(groups, triton.cdiv(num_experts, _BLOCK_E))](
        counts, totals, rows, E=num_experts, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_E=_BLOCK_E, num_warps=4
    )


def place_choices(
    experts: Tensor,
    order: Tensor | None,
    counts: Tensor,
    group_size: int,
    limits: tuple[int, int, int] = (0, 0, 0),
    starts: Tensor | None = None,
) -> Tensor:
    """Slots (T, K) of what `scan_counts` made of `count_choices`, whose arguments these are.

    Args:
        experts: (T, K) int32.
        order: (T,) int64, or None.
        counts: (G, K, blocks, E) int32.
        group_size: S.
        limits: C, that of a smaller last group, and R; none where starts are given.
        starts: (E,) int32 at least, first row of each expert, none of which is full, or None.
    """
    num_tokens, num_choices = experts.shape
    groups, _, blocks, num_experts = counts.shape
    slots = torch.empty_like(experts)
    _place_kernel[(groups * blocks, num_choices)](
        experts, order, counts, starts, slots, num_tokens, group_size, blocks, *limits,
        E=num_experts, K=num_choices, BLOCK_N=_BLOCK_N, num_warps=4,
    )  # fmt: skip
    return slots


def sort_slots(
    experts: Tensor,
    gates: Tensor,
    num_experts: int,
    group_size: int,
    capacity: int,
    last_capacity: int,
    rows_per_expert: int,
    batch_priority: bool,
    use_sum: bool,
) -> Tensor:
    """Slots (T, K) by design A, for any S; arguments are contiguous and T is at least 1."""
    order = _priority_order(gates, group_size, use_sum) if batch_priority else None
    counts = count_choices(experts, order, num_experts, group_size)
    scan_counts(counts.flatten(1, 2))
    return place_choices(experts, order, counts, group_size, (capacity, last_capacity, rows_per_expert))
