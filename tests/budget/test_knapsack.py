"""The exact choice, held against trying everything."""

from itertools import product

import numpy as np
import pytest

from vmoe_torch.budget.knapsack import choose


def _sum(tables, choice):
    return sum(table[option] for table, option in zip(tables, choice))


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    shapes = random.integers(1, 5, size=random.integers(1, 5))
    # Small whole numbers make ties, a loss may fall as well as rise.
    costs = [random.integers(0, 6, size=size).astype(float) for size in shapes]
    losses = [random.integers(-3, 4, size=size).astype(float) for size in shapes]
    for budget in (-1.0, 3.0, 7.0, 30.0):
        every = [(_sum(losses, choice), _sum(costs, choice)) for choice in product(*map(range, shapes))]
        within = [(loss, cost) for loss, cost in every if cost <= budget]
        chosen = choose(costs, losses, budget)
        if not within:
            assert chosen is None
        else:
            assert (_sum(losses, chosen), _sum(costs, chosen)) == min(within)


def test_many_layers_stay_quick():
    random = np.random.default_rng(0)
    costs = [random.random(26) for _ in range(24)]
    losses = [1 - cost + 0.1 * random.random(26) for cost in costs]
    chosen = choose(costs, losses, 12.0)
    assert sum(cost[option] for cost, option in zip(costs, chosen)) <= 12.0
