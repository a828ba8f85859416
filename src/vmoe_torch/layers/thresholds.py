"""Thresholds of gates: which choices are above one, and which threshold lets a wanted number of them through.

Dims: T tokens in groups of S (the last one may be smaller), K choices per token, P points.
"""

import torch
from torch import Tensor

from vmoe_kernels.common.groups import split_groups

# Point p of a table of thresholds is that of (p + 1) / POINTS_PER_EXPERT experts per token.
POINTS_PER_EXPERT = 100
# No kernel has more choices per token.
POINTS = 8 * POINTS_PER_EXPERT


def kept_number(group_size: int, mean: float) -> int:
    """Choices that a group of S tokens keeps at so many on average: to the nearest, half to even, and at least 1."""
    return max(1, round(group_size * mean))


def ranked(gates: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Orders the choices of each group by their gates.

    Args:
        gates: (T, K) of the choices of each token; NaN before numbers, ties by token and rank.
        group_size: S.

    Returns:
        (T, K) int64 place of each choice in its group, from 0; and the (P,) thresholds at which 0.01, 0.02, ... experts
        per token are kept: the round(S * mean)-th largest gate, past K 0, of several groups the mean by tokens.
    """
    gates = gates.detach()
    places, table = [], gates.new_zeros(POINTS)
    means = torch.arange(1, POINTS + 1, device=gates.device, dtype=torch.float64) / POINTS_PER_EXPERT
    for tokens, groups in split_groups(gates.shape[0], group_size):
        size = (tokens.stop - tokens.start) // groups if groups > 0 else 0
        if size == 0:
            continue
        flat = gates[tokens].reshape(groups, -1)
        ordered, order = flat.sort(dim=1, descending=True, stable=True)
        place = torch.arange(flat.shape[1], device=gates.device).expand_as(order)
        places.append(torch.zeros_like(order).scatter(1, order, place).view(-1, gates.shape[1]))
        # Multiplied as `kept_number` does, so that both round alike.
        rank = (size * means).round().long().clamp(1, flat.shape[1]) - 1
        found = torch.where(means <= gates.shape[1], ordered[:, rank].sum(0), 0.0)
        table = table + found * (size / gates.shape[0])
    return torch.cat(places) if places else gates.new_zeros(gates.shape, dtype=torch.int64), table


def largest(places: Tensor, group_size: int, means: tuple[float, ...], draw: Tensor | None = None) -> Tensor:
    """Which choices are the round(S * mean) first of their group: exactly so many, and at least 1.

    Args:
        places: (T, K) as `ranked` has them.
        group_size: S.
        means: experts per token on average, above 0.
        draw: 0-dim int64, which of several means it is; of one, None.

    Returns:
        (T, K) bool.
    """
    parts = []
    for tokens, groups in split_groups(places.shape[0], group_size):
        size = (tokens.stop - tokens.start) // groups if groups > 0 else 0
        wanted = kept_number(size, means[0])
        for number, mean in enumerate(means[1:], 1):
            wanted = torch.where(draw == number, kept_number(size, mean), wanted)
        parts.append(places[tokens] < wanted)
    return torch.cat(parts)


def place_of(mean: float) -> float:
    """Where in a table so many experts per token are, between two points in proportion."""
    # Rounded, so that 1.1 is a point.
    return float(min(max(round(mean * POINTS_PER_EXPERT, 6) - 1, 0), POINTS - 1))
