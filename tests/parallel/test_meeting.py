"""Ranks meet under a name that no dead process left in the store, and say who did not come."""

import threading
import time

import pytest
import torch.distributed as dist

from vmoe_torch.parallel import RankError
from vmoe_torch.parallel.ranks.meeting import hello, welcome

TIMEOUT = 30.0


def _meet(store, world_size, late=()):
    """Names that the ranks agreed on; those in `late` come when rank 0 has looked around already."""
    names = [None] * world_size

    def arrive(rank):
        if rank in late:
            time.sleep(0.1)
        names[rank] = hello(store, rank, TIMEOUT) if rank else welcome(store, world_size, TIMEOUT)

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return names


@pytest.mark.parametrize("late", [(), (0,), (1, 2)], ids=str)
def test_every_meeting_has_a_name_of_its_own(late):
    store = dist.HashStore()
    first = _meet(store, 3)
    # What processes left that died while they waited: a word that nobody will take the answer to.
    store.set("hello/1", "of a dead process")
    second = _meet(store, 3, late)
    assert first[0] is not None
    assert second[0] is not None
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_missing_rank_is_named():
    with pytest.raises(RankError, match=r"all ranks must arrive within 0.1 s, ranks 1, 2 have not"):
        welcome(dist.HashStore(), 3, 0.1)
    with pytest.raises(RankError, match=r"all ranks must arrive within 0.1 s, rank 0 has not"):
        hello(dist.HashStore(), 2, 0.1)
