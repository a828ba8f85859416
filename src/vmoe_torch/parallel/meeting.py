"""How ranks meet, also after a restart, and how each of them learns why another one failed.

torchrun keeps one store for all restarts of a run, and torch 2.14 writes the addresses of the ranks under the same names
every time. A rank that is early after a restart so finds the address of a process that is dead, and its connection is
refused. Here the ranks agree on a fresh name first, and meet under that.
"""

import datetime
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

# Seconds between looks at the store, and for which a rank waits to learn why a collective failed.
_PAUSE = 0.01
_PATIENCE = 2.0


class RankError(RuntimeError):
    """Another rank has failed, or does not answer; the message says which one, and why where that is known."""


def join(backend: str, timeout: float = 600.0) -> None:
    """`torch.distributed.init_process_group` for torchrun's environment that never meets a process of an earlier try.

    Args:
        backend: "nccl" or "gloo".
        timeout: seconds after which a rank that waits for another gives up, here and in every collective.

    Raises:
        RankError: if a rank has not arrived in time, naming it.
    """
    wait = datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    store = dist.PrefixStore("vmoe", store)
    name = _welcome(store, world_size, timeout) if rank == 0 else _hello(store, rank, timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world_size, timeout=wait
    )


def _hello(store: dist.Store, rank: int, timeout: float) -> str:
    """Says that this rank is here, under a word of its own; the name to meet under is the answer to that word."""
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    try:
        store.wait([f"welcome/{word}"], datetime.timedelta(seconds=timeout))
    except dist.DistStoreError as error:
        raise RankError(f"rank 0 must arrive within {timeout:g} s, got no answer") from error
    name = store.get(f"welcome/{word}").decode()
    store.set(f"{name}/here/{rank}", "")
    return name


def _welcome(store: dist.Store, world_size: int, timeout: float) -> str:
    """Answers every rank's word with a fresh name until all have it; words of dead processes are answered in vain."""
    name = uuid.uuid4().hex
    answered = {}
    missing = list(range(1, world_size))
    deadline = time.monotonic() + timeout
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                word = store.get(f"hello/{rank}").decode()
                if answered.get(rank) != word:
                    answered[rank] = word
                    store.set(f"welcome/{word}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/here/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise RankError(f"all {world_size} ranks must arrive within {timeout:g} s, got none of rank {_some(missing)}")
        time.sleep(_PAUSE)
    return name


@contextmanager
def shared_errors(patience: float = _PATIENCE) -> Iterator[None]:
    """Makes every rank's error known to the others, for the length of a `with` block that all ranks enter together.

    A rank that fails by itself leaves its error in the store. A rank in which a collective fails looks there, and raises
    a RankError that says which rank failed and why, or which ranks no longer answer.

    Args:
        patience: seconds for which a rank waits to learn that; all ranks end within the group's timeout and this.

    Raises:
        RankError: in place of the error of a collective that another rank's failure has broken.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, src=0)
    store = dist.PrefixStore(f"errors/{names[0]}", dist.distributed_c10d._get_default_store())
    try:
        yield
    except Exception as error:
        if not _of_a_collective(error):
            text = f"rank {dist.get_rank()} failed: {type(error).__name__}: {' '.join(str(error).split())}"
            _first(store, text)
            raise
        reason = _reason(store, patience)
        if reason is None:
            raise
        _first(store, reason)
        raise RankError(reason) from error


def _of_a_collective(error: Exception) -> bool:
    """Whether the error says no more than that ranks lost each other."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _first(store: dist.Store, text: str) -> None:
    """Leaves the error of this rank, unless another one's came first."""
    try:
        store.compare_set("error", "", text)
    except RuntimeError:
        # The process that keeps the store is gone: the others will see that.
        return


def _reason(store: dist.Store, patience: float) -> str | None:
    """The first error that a rank has left, else the ranks that are silent; None if the store has gone, too."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    deadline = time.monotonic() + patience
    try:
        store.set(f"alive/{rank}", "")
        while time.monotonic() < deadline:
            if store.check(["error"]):
                return store.get("error").decode()
            time.sleep(_PAUSE)
        silent = [other for other in range(world_size) if not store.check([f"alive/{other}"])]
    except RuntimeError:
        return None
    return f"rank {_some(silent)} does not answer" if silent else "ranks lost each other, and none of them says why"


def _some(ranks: list[int], most: int = 8) -> str:
    rest = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(map(str, ranks[:most])) + rest


