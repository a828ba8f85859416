"""How every rank learns why another one failed: a collective itself says no more than that a connection closed."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

# Seconds for which a rank waits to learn why a collective failed, and between looks at the store.
_PATIENCE, _PAUSE = 2.0, 0.01


class RankError(RuntimeError):
    """Another rank has failed, or does not answer; the message says which one, and why where that is known."""


@contextmanager
def shared_errors(patience: float = _PATIENCE) -> Iterator[None]:
    """Makes every rank's error known to the others, for the length of a `with` block that all ranks enter together.

    A rank that fails by itself leaves its error in the store of the process group. A rank in which a collective fails
    looks there, and raises a RankError that says which rank failed and why, or which ranks give no sign of life: the
    group's timeout and `patience` bound how long that takes. Without a process group, or in one of a single rank,
    nothing happens.

    Args:
        patience: seconds to wait for the other's error.

    Raises:
        RankError: in place of the error of a collective that another rank's failure has broken.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    # A name of this block: the store may hold errors of an earlier one.
    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, src=0)
    store = dist.PrefixStore(f"errors/{names[0]}", dist.distributed_c10d._get_default_store())
    try:
        yield
    # Ctrl-C in one process is news to the others, too.
    except (Exception, KeyboardInterrupt) as error:
        if not _of_a_collective(error):
            text = " ".join(str(error).split())
            _leave(store, f"rank {dist.get_rank()} failed: {type(error).__name__}: {text}")
            raise
        reason = _reason(store, patience)
        if reason is None:
            raise
        _leave(store, reason)
        raise RankError(reason) from error


def list_ranks(ranks: list[int], most: int = 8) -> str:
    """ "rank 1", "ranks 1, 2", or the first few of many."""
    rest = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:most]))}{rest}"


def _of_a_collective(error: BaseException) -> bool:
    """Whether the error says no more than that ranks lost each other; gloo's is known by its file names only."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _leave(store: dist.Store, text: str) -> None:
    """Leaves an error for the others, unless there is one already."""
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
    if not silent:
        return "ranks lost each other, and none of them says why"
    return f"{list_ranks(silent)} {'gives' if len(silent) == 1 else 'give'} no sign of life: hanging, or killed"
