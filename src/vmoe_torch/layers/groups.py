"""How tokens are grouped for routing, and how much room each expert has for them."""

from typing import NamedTuple


class Groups(NamedTuple):
    """Consecutive runs of tokens that are routed on their own; the last one may be smaller."""

    tokens: int
    """T, of all groups; a tensor in a trace that leaves the number of images open."""
    size: int
    """S, tokens of a whole group."""
    capacity: int
    """C, slots per expert in a whole group."""
    last_capacity: int
    """Slots per expert in a smaller last group; where a record leaves the number open, as `portable` has it."""
    rows: int
    """R, rows per expert in the buffer of all groups."""


def grouped(tokens: int, size: int, capacity: int, last_capacity: int) -> Groups:
    """`Groups` of the least buffer that holds them: one slot after another, group by group.

    Args:
        tokens: T.
        size: S.
        capacity: C.
        last_capacity: slots per expert in a smaller last group, of any value where there is none.
    """
    rows = tokens // size * capacity
    if tokens % size > 0:
        rows += last_capacity
    return Groups(tokens, size, capacity, last_capacity, rows)
