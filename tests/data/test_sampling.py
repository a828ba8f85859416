"""Some images of a data set, in random order."""

import pytest

from vmoe_torch.data.sampling import sample


def test_sample_is_random_seeded_and_bounded():
    first = sample(range(100), 30, 1)
    assert len(set(first)) == 30
    assert list(first) == list(sample(range(100), 30, 1)) != list(sample(range(100), 30, 2))
    assert sorted(sample(range(100), None, 1)) == sorted(sample(range(100), 999, 1)) == list(range(100))
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        sample(range(100), 0)
    with pytest.raises(ValueError, match="dataset must hold at least one image, got none"):
        sample([], 3)
