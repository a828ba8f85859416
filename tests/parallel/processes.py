"""Runs a function in several gloo processes on this machine; they meet in a file, so no port is opened.

They are forks of one process that has imported what all of them need and has run none of it: what the tests change in
their own process, environment included, does not reach them.
"""

import datetime
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds of imports, once and not in each process.
multiprocessing.set_forkserver_preload(["vmoe_torch.parallel", "vmoe_torch.train", "torch._dynamo", "pytest"])


def enter(rank: int, world: int, meeting: str, function: Callable, arguments: tuple, timeout: float = 60.0) -> None:
    """Joins the group and calls `function(*arguments)`."""
    warnings.simplefilter("error")
    # torch's own deprecations inside its distributed packages.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=wait)
    try:
        function(*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def start(world: int, folder: Path, function: Callable, *arguments, timeout: float = 60.0) -> mp.ProcessContext:
    """Processes that call `function(*arguments)`, as they run."""
    meeting = folder / f"meeting-{world}-{len(list(folder.iterdir()))}"
    arguments = (world, str(meeting), function, arguments, timeout)
    return mp.start_processes(enter, arguments, nprocs=world, join=False, start_method="forkserver")


def run(world: int, folder: Path, function: Callable, *arguments, timeout: float = 60.0) -> None:
    """Calls `function(*arguments)` in `world` processes; an error in any of them is raised here."""
    wait(start(world, folder, function, *arguments, timeout=timeout))


def wait(context: mp.ProcessContext) -> None:
    """Until all have ended; an error in any of them is raised here, and ends the others."""
    while not context.join():
        continue
