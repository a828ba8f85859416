"""How wide each expert is, which ones are of one size, and where their rows lie.

A buffer's rows follow the experts' numbers. Experts of one size share a tensor, so their rows must follow each other:
`ExpertSizes.place` renumbers slots, sizes from wide to narrow and null experts, which have no hidden units, last.

Dims: E experts, H hidden width of the layer, T tokens, K choices, R rows per expert, N ranks that share the experts.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Widths that the matrix units of a GPU like; the lesser one for layers whose H is at most the last.
MULTIPLE, SMALL_MULTIPLE, SMALL = 128, 16, 1024


class SizeGroup(NamedTuple):
    """The experts of one size."""

    hidden: int
    """Their hidden width, 0 for null experts."""
    experts: tuple[int, ...]
    """Their numbers, ascending."""

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Runs of consecutive experts, first and last one."""
        runs: list[tuple[int, int]] = []
        for expert in self.experts:
            if runs and runs[-1][1] == expert - 1:
                runs[-1] = (runs[-1][0], expert)
            else:
                runs.append((expert, expert))
        return runs

    @property
    def name(self) -> str:
        """Of the module that holds them: "experts_0to3_8" has experts 0 to 3 and 8."""
        return "experts_" + "_".join(f"{a}" if a == b else f"{a}to{b}" for a, b in self.runs)


class ExpertSizes:
    """The hidden widths of a layer's experts.

    Args:
        hidden: H_e of each of the E experts.

    Attributes:
        hidden: the same, a tuple.
        groups: of the experts of one size each, from wide to narrow.
    """

    def __init__(self, hidden: Sequence[int]):
        self.hidden = tuple(hidden)
        self.groups = tuple(
            SizeGroup(size, tuple(e for e, own in enumerate(self.hidden) if own == size))
            for size in sorted(set(self.hidden), reverse=True)
        )

    def counts(self, ranks: int = 1) -> list[int]:
        """Experts of each size that one of N ranks holds."""
        return [len(group.experts) // ranks for group in self.groups]

    def check_ranks(self, ep: int) -> None:
        """Raises ValueError unless N ranks can hold the same mix of sizes, so that the exchange stays even."""
        if len(self.hidden) % ep:
            raise ValueError(f"ep must divide num_experts={len(self.hidden)}, got ep={ep}")
        for group in self.groups:
            if len(group.experts) % ep:
                raise ValueError(
                    "ep must divide the number of experts of every size, so that every rank holds the same mix, "
                    f"got ep={ep} and {len(group.experts)} of hidden width {group.hidden}"
                )

    def place(self, slots: Tensor, rows: int, ranks: int) -> Tensor:
        """Slots for a buffer in which a rank's experts follow each other, and among them those of one size.

        Args:
            slots: (T, K) int32, row e * R + r is row r of expert e; -1 where dropped.
            rows: R.
            ranks: N.

        Returns:
            (T, K) int32; the same where the experts lie so already.
        """
        placed = slots
        for first, end, shift in self._moves(ranks):
            inside = (slots >= first * rows) & (slots < end * rows)
            placed = torch.where(inside, slots + shift * rows, placed)
        return placed

    def _moves(self, ranks: int) -> list[tuple[int, int, int]]:
        """Runs of experts first..end-1 that move by so many places."""
        order = []
        for rank in range(ranks):
            for group, count in zip(self.groups, self.counts(ranks)):
                order += group.experts[rank * count : (rank + 1) * count]
        moves: list[tuple[int, int, int]] = []
        for expert, shift in sorted((expert, place - expert) for place, expert in enumerate(order)):
            if moves and moves[-1][1:] == (expert, shift):
                moves[-1] = (moves[-1][0], expert + 1, shift)
            else:
                moves.append((expert, expert + 1, shift))
        return [move for move in moves if move[2] != 0]

    def parts(self, per_expert: Tensor) -> list[Tensor]:
        """(..., E) cut into the sizes: (..., n) each."""
        if len(self.groups) == 1:
            return [per_expert]
        runs = [[per_expert[..., a : b + 1] for a, b in group.runs] for group in self.groups]
        return [part[0] if len(part) == 1 else torch.cat(part, -1) for part in runs]


def resolve_sizes(
    expert_hidden: Sequence[int | float] | int | float | None, num_experts: int, hidden: int
) -> ExpertSizes:
    """What `MoeOptions.expert_hidden` means in a layer.

    Args:
        expert_hidden: E widths or one for all, an int for hidden units or a float for a share of H; None is H.
        num_experts: E.
        hidden: H.

    Raises:
        ValueError: if there are not E of them, none has hidden units, or one is neither 0 nor H nor a multiple of 128
            (of 16 where H is at most 1024).
    """
    widths = per_expert(expert_hidden, num_experts)
    if widths is None:
        return ExpertSizes((hidden,) * num_experts)
    sizes = ExpertSizes([_width(value, hidden) for value in widths])
    if sizes.groups[0].hidden == 0:
        raise ValueError("expert_hidden must leave hidden units to at least one expert, got 0 for all")
    return sizes


def per_expert(expert_hidden: Any, num_experts: int) -> Sequence[Any] | None:
    """The widths one by one, of one for all too; None stays.

    Raises:
        ValueError: unless there is one for each expert.
    """
    if expert_hidden is None:
        return None
    if isinstance(expert_hidden, numbers.Real) and not isinstance(expert_hidden, bool):
        return (expert_hidden,) * num_experts
    rule = f"expert_hidden must be None, one width, or have a width for each of num_experts={num_experts}"
    if isinstance(expert_hidden, str) or not isinstance(expert_hidden, Sequence):
        raise ValueError(f"{rule}, got {expert_hidden!r}")
    if len(expert_hidden) != num_experts:
        raise ValueError(f"{rule}, got {len(expert_hidden)}")
    return expert_hidden


def _width(value: float, hidden: int) -> int:
    multiple = SMALL_MULTIPLE if hidden <= SMALL else MULTIPLE
    rule = f"expert_hidden must be 0, H={hidden} or multiples of {multiple}, as ints or as floats that are shares of H"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{rule}, got {value!r} (not a number)")
    width = value
    if not isinstance(value, numbers.Integral):
        width = value * hidden
        if not math.isfinite(width) or abs(width - round(width)) > 1e-6 * hidden:
            raise ValueError(f"{rule}, got {value}")
    width = round(width)
    if width < 0 or (width != hidden and width % multiple):
        raise ValueError(f"{rule}, got {value}")
    return width
