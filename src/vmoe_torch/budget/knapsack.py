"""One option per layer, so that the summed loss is least under a bound on the summed cost."""

from collections.abc import Sequence

import numpy as np


def choose(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: float) -> list[int] | None:
    """The exact optimum: layer after layer, of all partial choices only those remain that no other one beats in both.

    Args:
        costs: for each layer, the cost of every option.
        losses: the same shapes.
        budget: largest sum of costs.

    Returns:
        The number of each layer's option, of equal losses the cheapest; None if no choice fits.
    """
    # The least that the layers after this one cost.
    rest = np.cumsum([0.0, *(cost.min() for cost in costs[:0:-1])])[::-1]
    cost, loss = np.zeros(1), np.zeros(1)
    steps = []
    for number, (own_cost, own_loss) in enumerate(zip(costs, losses)):
        cost = np.add.outer(cost, own_cost).ravel()
        loss = np.add.outer(loss, own_loss).ravel()
        order = np.lexsort((loss, cost))
        # In order of cost, what is no better than something cheaper is out.
        before = np.minimum.accumulate(np.append(np.inf, loss[order][:-1]))
        kept = order[(loss[order] < before) & (cost[order] + rest[number] <= budget)]
        if len(kept) == 0:
            return None
        cost, loss = cost[kept], loss[kept]
        steps.append((kept, len(own_cost)))
    chosen = []
    place = int(loss.argmin())
    for kept, options in reversed(steps):
        place, option = divmod(int(kept[place]), options)
        chosen.append(option)
    return chosen[::-1]
