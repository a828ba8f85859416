"""Small models whose routing drops tokens."""

from functools import partial

import pytest

from tests.tiny import dropping


@pytest.fixture
def build():
    """Builds a model of one block and random weights, its MLP an MoE layer, in eval mode."""
    return partial(dropping, depth=1)
