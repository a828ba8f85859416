"""The device mesh: `dp` replicas of the experts, each spread over `ep` ranks; data is sharded over both axes."""

import datetime
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor


def build_mesh(dp: int, ep: int, device_type: str) -> DeviceMesh:
    """A (dp, ep) mesh over all ranks; consecutive ranks share a replica of the experts.

    Args:
        dp: replicas of the experts.
        ep: ranks that one set of experts is spread over.
        device_type: "cuda" or "cpu".

    Raises:
        ValueError: if dp * ep is not the number of ranks.
    """
    world = dist.get_world_size()
    if dp < 1 or ep < 1 or dp * ep != world:
        raise ValueError(f"dp * ep must be the number of ranks {world}, got dp={dp} and ep={ep}")
    mesh = init_device_mesh(device_type, (dp, ep), mesh_dim_names=("dp", "ep"))
    for group in mesh.get_all_groups():
        keep_timeout(group)
    return mesh


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that lie on one mesh in one way together: operations on several of them cannot mix meshes."""
    groups: dict = {}
    for tensor in tensors:
        key = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def keep_timeout(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Gives a group of some ranks the timeout of the group of all; torch gives it 10 (NCCL) or 30 (gloo) minutes."""
    timeout = group_timeout()
    if timeout is not None:
        device = torch.device(dist.distributed_c10d._get_object_coll_device(group))
        group._get_backend(device)._set_default_timeout(timeout)
    return group


@contextmanager
def timeout_of_all(seconds: float) -> Iterator[None]:
    """Gives the group of all ranks another timeout for the length of a `with` block, and so all groups made in it."""
    before = group_timeout()
    if before is None:
        yield
        return
    everyone = dist.group.WORLD
    backend = everyone._get_backend(torch.device(dist.distributed_c10d._get_object_coll_device(everyone)))
    backend._set_default_timeout(datetime.timedelta(seconds=seconds))
    try:
        yield
    finally:
        backend._set_default_timeout(before)


def group_timeout() -> datetime.timedelta | None:
    """That of the group of all, as the argument `timeout` of `torch.distributed.new_group` takes it."""
    device = torch.device(dist.distributed_c10d._get_object_coll_device(dist.group.WORLD))
    options = dist.group.WORLD._get_backend(device).options
    # The fake group of tests has no options, and never waits.
    return None if options is None else options._timeout
