"""The processes of a run: one, or those that torchrun started."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vmoe_torch.parallel import join, on_first, require_same, share_thresholds, shared_errors
from vmoe_torch.parallel.mesh import timeout_of_all
from vmoe_torch.train.device import chosen_device

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int
    """Number of this process, in 0..world_size-1."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Device that this process computes on."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over the processes, and whose forward the thresholds of threshold
        routers; itself if there is one process."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return share_thresholds(DistributedDataParallel(model, device_ids=devices))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in each of them."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value by rank, in each of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def require_same(self, values: dict[str, Any]) -> None:
        """Raises ValueError in all processes if they have different values, naming the first that differs."""
        if self.world_size > 1:
            require_same(values, rule="must be the same in all processes")

    def on_first(self, action: Callable[[], T]) -> T:
        """What an action of the first process gives, in each of them, or its error."""
        return on_first(action) if self.world_size > 1 else action()


@contextmanager
def processes(device: str, timeout: float = 600.0, spread: bool = False) -> Iterator[Processes]:
    """Joins the processes that torchrun's environment names, for the length of a `with` block.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        timeout: seconds after which a process that waits for another gives up.
        spread: whether the model is spread over the processes, which takes a group even of one.

    Raises:
        ValueError: if there is no such device, several processes of a machine would share it, or a spread model has no
            torchrun.
        RankError: if another process has failed or does not answer.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"run.device must be cuda under torchrun, which gives each process its own, got {device}")
    place = chosen_device("run.device", device, int(os.environ.get("LOCAL_RANK", 0)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    joins = (world_size > 1 or spread) and not dist.is_initialized()
    if joins and spread and "MASTER_ADDR" not in os.environ:
        raise ValueError("parallel.ep above 1 and parallel.fsdp need torchrun, got a process started without it")
    if joins:
        backend = "nccl" if place.type == "cuda" else "gloo"
        join(backend, timeout)
    # A group that is there already has a timeout of its own.
    waits = timeout_of_all(timeout) if dist.is_initialized() and not joins else contextlib.nullcontext()
    try:
        with waits, shared_errors():
            yield Processes(rank, world_size, place)
    finally:
        if joins:
            dist.destroy_process_group()
