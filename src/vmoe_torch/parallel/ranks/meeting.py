"""How ranks meet, also after a restart.

torchrun keeps one store for all restarts of a run, and torch (2.14) leaves the addresses of the ranks there under the
same names every time. So a rank that is early after a restart finds the address of a dead process, and gloo gives up
after four refused connections ("connectFullMesh failed"). Here the ranks agree on a fresh name, and meet under that.
torchrun's count of restarts is no such name: it differs between nodes that joined at different times.
"""

import datetime
import time
import uuid

import torch
import torch.distributed as dist

from vmoe_torch.parallel.ranks.failures import RankError, list_ranks

# Seconds between looks at the store.
_PAUSE = 0.01


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
    name = welcome(store, world_size, timeout) if rank == 0 else hello(store, rank, timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world_size, timeout=wait
    )


def wait_for_all() -> None:
    """Until all ranks are here; one that waits for long gives up as `join` was told."""
    # Without its number, NCCL warns that it takes the current device.
    on_gpu = dist.get_backend() == dist.Backend.NCCL
    dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def hello(store: dist.Store, rank: int, timeout: float) -> str:
    """Says that this rank is here, under a word of its own; the name to meet under is the answer to that word."""
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    try:
        store.wait([f"welcome/{word}"], datetime.timedelta(seconds=timeout))
    except dist.DistStoreError as error:
        raise RankError(f"all ranks must arrive within {timeout:g} s, rank 0 has not") from error
    name = store.get(f"welcome/{word}").decode()
    store.set(f"{name}/here/{rank}", "")
    return name


def welcome(store: dist.Store, world_size: int, timeout: float) -> str:
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
            have = "has" if len(missing) == 1 else "have"
            raise RankError(f"all ranks must arrive within {timeout:g} s, {list_ranks(missing)} {have} not")
        time.sleep(_PAUSE)
    return name
