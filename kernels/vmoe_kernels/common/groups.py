"""Groups of tokens: the capacity of one, how many there are, their rows in an expert's buffer, and sums over each.

Dims: T tokens in G groups of S (the last one may be smaller), E experts, K choices per token, C slots.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vmoe_kernels.common.checks import check_integer, check_number, check_rows


def compute_capacity(
    num_tokens: int,
    num_experts: int,
    capacity_factor: float,
    num_selected_experts: int = 1,
    rounding: str = "ceil",
    multiple_of: int | None = 4,
    mean_selected_experts: float | None = None,
) -> int:
    """Slots per expert and group: num_tokens * K * capacity_factor / E, rounded.

    Args:
        num_tokens: S, tokens of the group.
        num_experts: E.
        capacity_factor: 1.0 is just enough for perfectly balanced experts.
        num_selected_experts: K.
        rounding: "ceil" or "round" (half to even).
        multiple_of: the rounded value goes up to a multiple of this; None or 0 leaves it.
        mean_selected_experts: of a token, where that differs from token to token; takes the place of K.

    Returns:
        C, at least 1.

    Raises:
        ValueError: if a number is of the wrong kind or not finite, the rounding is unknown, or the capacity falls below
            one slot or does not fit in int32.
    """
    # TorchScript compiles this function, so it spells out rounding half to even, and knows its types.
    if not torch.jit.is_scripting():
        num_tokens = check_integer("num_tokens", num_tokens, 0)
        num_experts = check_integer("num_experts", num_experts, 1)
        capacity_factor = check_number("capacity_factor", capacity_factor, "above 0", 0.0)
        num_selected_experts = check_integer("num_selected_experts", num_selected_experts, 1)
        multiple_of = check_integer("multiple_of", 0 if multiple_of is None else multiple_of, 0)
        if mean_selected_experts is not None:
            mean_selected_experts = check_number("mean_selected_experts", mean_selected_experts, "at least 0", 0.0)
    exact = num_tokens * num_selected_experts * capacity_factor / num_experts
    if mean_selected_experts is not None:
        exact = num_tokens * mean_selected_experts * capacity_factor / num_experts
    if not torch.jit.is_scripting():
        check_rows(exact)
    if rounding == "ceil":
        capacity = math.ceil(exact)
    elif rounding == "round":
        capacity = math.floor(exact)
        rest = exact - capacity
        if rest > 0.5 or (rest == 0.5 and capacity % 2 == 1):
            capacity += 1
    else:
        raise ValueError(f"rounding must be 'ceil' or 'round', got {rounding}")
    if capacity < 1:
        raise ValueError(
            f"capacity must be at least 1 slot, got {capacity} from num_tokens={num_tokens}, "
            f"num_selected_experts={num_selected_experts}, capacity_factor={capacity_factor}, num_experts={num_experts}"
        )
    if multiple_of is not None and multiple_of > 0:
        capacity += -capacity % multiple_of
    return capacity


def num_groups(num_tokens: int, group_size: int) -> int:
    """G: whole groups, and a smaller one for what remains."""
    num_tokens = check_integer("num_tokens", num_tokens, 0)
    group_size = check_integer("group_size", group_size, 1, "at least 1 token")
    return -(-num_tokens // group_size)


def rows_per_expert(num_tokens: int, group_size: int, capacity: int, last_capacity: int) -> int:
    """Rows of one expert in the buffer: C for every whole group, then those of a smaller last group.

    Args:
        num_tokens: T.
        group_size: S, tokens per group.
        capacity: C, slots per expert in a whole group.
        last_capacity: slots per expert in a smaller last group.

    Returns:
        R.

    Raises:
        ValueError: if a number is no integer or negative, or R is 2**31 or more.
    """
    num_tokens = check_integer("num_tokens", num_tokens, 0)
    group_size = check_integer("group_size", group_size, 1, "at least 1 token")
    capacity = check_integer("capacity", capacity, 0)
    last_capacity = check_integer("last_capacity", last_capacity, 0)
    rest = num_tokens % group_size
    rows = num_tokens // group_size * capacity + (last_capacity if rest else 0)
    check_rows(rows)
    return rows


def dropless_rows(num_choices: int, num_experts: int, tile: int) -> int:
    """Rows of a buffer that holds every choice, however they fall: each expert's begin at a whole tile.

    Args:
        num_choices: T * K.
        num_experts: E.
        tile: rows that belong to one expert.

    Returns:
        N, a multiple of the tile, at most T * K + E * (tile - 1).
    """
    return (num_choices + num_experts * (tile - 1)) // tile * tile


def expert_of_slot(slots: Tensor, starts: Tensor) -> Tensor:
    """The expert that owns each row of a dropless buffer.

    Args:
        slots: (...) int32 rows, or -1.
        starts: (..., E) int32 first row of each expert, ascending; leading dims as those of slots, or 1.

    Returns:
        (...) int32 in 0..E-1, or -1.
    """
    # Experts without rows begin where the next one does: the last that begins there is the owner.
    return (slots.unsqueeze(-1) >= starts).sum(-1, dtype=torch.int32) - 1


def choices_of_rows(slots: Tensor, rows: int) -> Tensor:
    """The inverse of slots: (B, T, K) of B samples to (B, N) int32, the choice t * K + k of each row, or -1."""
    count, choices = slots.shape[0], slots[0].numel()
    first = torch.arange(count, device=slots.device).view(-1, 1, 1) * rows
    # Dropped choices land in a row that is cut off.
    places = torch.where(slots < 0, count * rows, slots + first).flatten()
    numbers = torch.arange(choices, device=slots.device, dtype=torch.int32).repeat(count)
    held = numbers.new_full((count * rows + 1,), -1).scatter(0, places, numbers)
    return held[:-1].view(count, rows)


def split_groups(num_tokens: int, group_size: int) -> list[tuple[slice, int]]:
    """All whole groups, then a smaller last one: the tokens, which may be none, and how many groups they form."""
    groups = num_tokens // group_size
    whole = groups * group_size
    return [(slice(0, whole), groups), (slice(whole, num_tokens), 1)]


def group_sum(values: Tensor, group_size: int) -> Tensor:
    """(T, E) -> (G, E)."""
    whole = values.shape[0] // group_size * group_size
    sums = values[:whole].view(-1, group_size, values.shape[1]).sum(1)
    if whole == values.shape[0]:
        return sums
    return torch.cat([sums, values[whole:].sum(0, keepdim=True)])


def group_mean(values: Tensor, group_size: int) -> Tensor:
    """(T, E) -> (G, E)."""
    return group_sum(values, group_size) / group_sizes(values, group_size)


def group_parts(values: Tensor, per_group: Tensor, group_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(T, E) as views (G', S', E), and the rows of (G, E) that go with each, (G', 1, E)."""
    groups = values.shape[0] // group_size
    whole = groups * group_size
    yield values[:whole].unflatten(0, (groups, group_size)), per_group[:groups].unsqueeze(1)
    if whole < values.shape[0]:
        yield values[whole:].unsqueeze(0), per_group[groups:].unsqueeze(1)


def group_sizes(values: Tensor, group_size: int) -> Tensor:
    """(T, E) -> (G, 1): tokens of each group, in the dtype of `values`."""
    num_tokens = values.shape[0]
    groups = num_groups(num_tokens, group_size)
    if num_tokens % group_size == 0:
        return values.new_full((groups, 1), group_size)
    start = torch.arange(groups, device=values.device, dtype=values.dtype).unsqueeze(1) * group_size
    return (num_tokens - start).clamp(max=group_size)
