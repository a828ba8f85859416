"""The slots on a GPU: two exact designs behind one launcher, and the table that picks one by the group's size.

Dims: T tokens in G groups of S (the last one may be smaller), K choices per token, E experts, C slots.
"select" (design B, this file): a program owns one expert of one group, holds the group's priorities in registers and
finds the threshold of those that fit. One launch, no scratch memory, no atomics. A program reads all choices of its
group whichever their experts are, so a group whose tokens all want one expert takes as long as any other. As it owns a
run of rows of the buffer, too, it can say in the same pass which choice each of them holds.
"sort" (design A, triton_slots_sort.py) takes any S and is three to six launches. Both keep the same choices; the order
inside an expert's part of the buffer differs and means nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe_kernels.common.checks import check_choices, check_rows, check_triton_dtypes, check_triton_routing
from vmoe_kernels.common.groups import num_groups, rows_per_expert
from vmoe_kernels.common.launch import ANY, Config, look_up, register_table, size_bucket
from vmoe_kernels.routing.triton_slots_sort import priority_keys, sort_slots
from vmoe_kernels.rows.triton_move import choice_of_row_triton

# Above this, 16 keys a thread and what is made of them spill registers: 16 warps leave a thread 128.
MAX_SELECT_GROUP = 4096
_BOUNDS = (63, MAX_SELECT_GROUP)

_SORT = Config({"DESIGN": "sort"}, num_warps=4)
_SELECT = Config({"DESIGN": "select"}, num_warps=4)
# Predicted, not measured: one launch beats five to eight while a group fits in a program. Tiny groups
# leave a program per expert and group too little to do. Deterministic mode takes the design that fits every size.
register_table(
    "slots",
    {(ANY, ANY, ANY): _SORT, (ANY, ANY, f"le{_BOUNDS[0]}"): _SORT, (ANY, ANY, f"le{_BOUNDS[1]}"): _SELECT},
    candidates=(_SORT, _SELECT),
)

# A priority no token has: every real one is greater.
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _leave_empty(choices_ptr, first, end, BLOCK: tl.constexpr):
    """The rows first..end-1 hold no choice; any number of them."""
    for start in range(first, end, BLOCK):
        rows = tl.arange(0, BLOCK)
        tl.store(choices_ptr + start + rows, tl.full((BLOCK,), -1, tl.int32), mask=rows < end - start)


@triton.jit(do_not_specialize=["num_tokens", "group_size", "capacity", "last_capacity", "rows_per_expert"])
def _select_kernel(
    experts_ptr,  # (T, K) int32
    gates_ptr,  # (T, K) floating
    slots_ptr,  # (T, K) int32
    choices_ptr,  # (E * R,) int32, or None
    num_tokens,
    group_size,
    capacity,
    last_capacity,
    rows_per_expert,
    K: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_S: tl.constexpr,  # at least S: a program holds a group's keys in registers
):
    """BPR. A program owns one expert of one group: the slots of its choices, and what its rows of the buffer hold."""
    group, expert = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = tl.minimum(num_tokens - group * group_size, group_size)
    places = tl.where(size < group_size, last_capacity, capacity)
    inside = tl.arange(0, BLOCK_S) < size
    tokens = group * group_size + tl.arange(0, BLOCK_S)
    keys = priority_keys(gates_ptr, tokens, inside, K, SUM)

    # Ranks before the boundary are kept whole, those after it dropped; of the boundary's own, the first `wanted`.
    boundary, wanted, taken = K, 0, 0
    candidates = tl.full((BLOCK_S,), _LOWEST, tl.int32)
    for k in tl.static_range(K):
        match = tl.load(experts_ptr + tokens * K + k, mask=inside, other=-1) == expert
        count = tl.sum(match.to(tl.int32), axis=0)
        free = places - taken
        crosses = (count > free) & (boundary == K)
        candidates = tl.where(crosses, tl.where(match, keys, _LOWEST), candidates)
        wanted = tl.where(crosses, free, wanted)
        boundary = tl.where(crosses, k, boundary)
        taken += tl.minimum(count, free)

    # The greatest threshold that `wanted` candidates reach, found bit by bit from the top: a radix select whose
    # digits are one bit, so that its histogram is one count.
    threshold = tl.full((), _LOWEST, tl.int64)
    step = tl.full((), 2**31, tl.int64)
    for _ in range(32):
        higher = threshold + step
        reached = tl.sum((candidates >= higher.to(tl.int32)).to(tl.int32), axis=0) >= wanted
        threshold = tl.where(reached, higher, threshold)
        step = step >> 1
    threshold = threshold.to(tl.int32)
    above = candidates > threshold
    tied = (candidates == threshold).to(tl.int32)
    free_ties = wanted - tl.sum(above.to(tl.int32), axis=0)
    wins = above.to(tl.int32) + tied * (tl.cumsum(tied, axis=0) <= free_ties).to(tl.int32)

    first_row = (expert * rows_per_expert + group * capacity).to(tl.int32)
    taken = 0
    for k in tl.static_range(K):
        choices = tokens * K + k
        match = (tl.load(experts_ptr + choices, mask=inside, other=-1) == expert).to(tl.int32)
        kept = match * tl.where(k < boundary, 1, tl.where(k == boundary, wins, 0))
        row = first_row + taken + tl.cumsum(kept, axis=0) - 1
        tl.store(slots_ptr + choices, tl.where(kept > 0, row, -1), mask=match > 0)
        if choices_ptr is not None:
            tl.store(choices_ptr + row, choices.to(tl.int32), mask=kept > 0)
        taken += tl.sum(kept, axis=0)
    if choices_ptr is not None:
        _leave_empty(choices_ptr, first_row + taken, first_row + places, BLOCK_S)


@triton.jit(do_not_specialize=["num_tokens", "group_size", "capacity", "last_capacity", "rows_per_expert"])
def _claim_kernel(
    experts_ptr,  # (T, K) int32
    slots_ptr,  # (T, K) int32
    choices_ptr,  # (E * R,) int32, or None
    num_tokens,
    group_size,
    capacity,
    last_capacity,
    rows_per_expert,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,  # at least S
):
    """Vanilla order. A program owns one expert of one group: slots and rows as in `_select_kernel`."""
    group, expert = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = tl.minimum(num_tokens - group * group_size, group_size)
    places = tl.where(size < group_size, last_capacity, capacity)
    inside = tl.arange(0, BLOCK_S) < size
    tokens = group * group_size + tl.arange(0, BLOCK_S)
    first_row = (expert * rows_per_expert + group * capacity).to(tl.int32)
    taken = 0
    for k in tl.static_range(K):
        choices = tokens * K + k
        match = tl.load(experts_ptr + choices, mask=inside, other=-1) == expert
        place = taken + tl.cumsum(match.to(tl.int32), axis=0) - 1
        row = tl.where(place < places, first_row + place, -1)
        tl.store(slots_ptr + choices, row, mask=match)
        if choices_ptr is not None:
            tl.store(choices_ptr + row, choices.to(tl.int32), mask=match & (row >= 0))
        taken += tl.sum(match.to(tl.int32), axis=0)
    if choices_ptr is not None:
        _leave_empty(choices_ptr, first_row + tl.minimum(taken, places), first_row + places, BLOCK_S)


def _select_warps(block: int, num_choices: int) -> int:
    """Few warps, as every count crosses them; but no more keys a thread than registers hold beside K choices."""
    return max(1, block // (256 if num_choices > 4 else 512))


def choose_design(num_tokens: int, group_size: int, device: torch.device) -> str:
    size = min(group_size, num_tokens)
    design = look_up("slots", device, size_bucket(size, _BOUNDS)).constexprs["DESIGN"]
    if design == "select" and size > MAX_SELECT_GROUP:
        raise ValueError(f"design 'select' holds groups of at most {MAX_SELECT_GROUP} tokens, got {size}")
    return design


def assign_slots_triton(experts: Tensor, gates: Tensor, *options) -> Tensor:
    """The `vmoe::assign_slots` op; arguments and errors as `assign_rows_triton`'s, whose slots these are."""
    return _assign(experts, gates, *options, choices_too=False)[0]


def assign_rows_triton(experts: Tensor, gates: Tensor, *options) -> tuple[Tensor, Tensor]:
    """The `vmoe::assign_rows` op: no host synchronisation, all groups in the same launches, two runs agree bitwise.

    Args:
        experts: (T, K) int32 expert of each choice, in 0..E-1, best first; K at most 8.
        gates: (T, K) float16, bfloat16 or float32; only BPR reads them.
        *options: those of `_assign`.

    Returns:
        (T, K) int32 row of each choice, or -1 where it was dropped; (E * R,) int32 choice of each row, or -1.

    Raises:
        ValueError: if E, K, the number of rows or the dtype of gates is beyond the kernels.
    """
    return _assign(experts, gates, *options, choices_too=True)


def _assign(
    experts: Tensor,
    gates: Tensor,
    num_experts: int,
    group_size: int,
    capacity: int,
    last_capacity: int,
    batch_priority: bool,
    priority: str,
    choices_too: bool,
) -> tuple[Tensor, Tensor | None]:
    """Slots and, if wanted, the choices of the rows.

    Args:
        experts: (T, K) int32.
        gates: (T, K).
        num_experts: E, at most 256.
        group_size: S.
        capacity: C of a whole group.
        last_capacity: C of a smaller last group.
        batch_priority: BPR instead of position order.
        priority: "max" (the first gate) or "sum" (of the K gates).
        choices_too: whether the choices of the rows are wanted.
    """
    num_tokens, num_choices = experts.shape
    check_triton_dtypes(gates=gates)
    check_triton_routing("slots", num_experts, num_choices, "the number of choices per token")
    groups = num_groups(num_tokens, group_size)
    rows = rows_per_expert(num_tokens, group_size, capacity, last_capacity)
    check_rows(num_experts * rows)
    choices = experts.new_empty(num_experts * rows) if choices_too else None
    if num_tokens == 0:
        return experts.new_empty(experts.shape), choices
    experts, gates = experts.contiguous(), gates.contiguous()
    use_sum = priority == "sum"
    if choose_design(num_tokens, group_size, experts.device) == "sort":
        limits = (capacity, last_capacity, rows)
        slots = sort_slots(experts, gates, num_experts, group_size, *limits, batch_priority, use_sum)
        return slots, choice_of_row_triton(slots, num_experts * rows) if choices_too else None
    if choices_too:
        check_choices(experts)
    slots = torch.empty_like(experts)
    # A token at least for each lane of the one warp.
    block = max(32, triton.next_power_of_2(min(group_size, num_tokens)))
    shape = (num_tokens, group_size, capacity, last_capacity, rows)
    launch = {"K": num_choices, "BLOCK_S": block, "num_warps": _select_warps(block, num_choices)}
    if batch_priority:
        # The largest groups leave no register for the rows of many choices.
        own_rows = None if block > 2048 and num_choices > 4 else choices
        _select_kernel[(groups, num_experts)](experts, gates, slots, own_rows, *shape, SUM=use_sum, **launch)
        if own_rows is None and choices_too:
            choices = choice_of_row_triton(slots, num_experts * rows)
    else:
        _claim_kernel[(groups, num_experts)](experts, slots, choices, *shape, **launch)
    return slots, choices
