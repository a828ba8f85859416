"""What all ranks must have alike: told by the same error on all of them, before a collective breaks or hangs on it."""

import hashlib
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
RULE = "must be the same on all ranks"


def require_same(values: dict[str, Any], group: dist.ProcessGroup | None = None, rule: str = RULE) -> None:
    """Compares values of all ranks, which must call this together.

    Args:
        values: by name; compared by their `repr`.
        group: the ranks; None is all.
        rule: what the error says of a value that differs.

    Raises:
        ValueError: on all ranks, naming the first value that differs and two ranks.
    """
    begin_same(values, group, rule)()


def begin_same(values: dict[str, Any], group: dist.ProcessGroup | None = None, rule: str = RULE) -> Callable[[], None]:
    """Begins what `require_same` does and returns what ends it, so that other work fits in between."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return lambda: None
    shown = {name: repr(value) for name, value in values.items()}
    digest = struct.unpack("4I", hashlib.blake2b(repr(shown).encode(), digest_size=16).digest())
    numbers = torch.tensor([*digest, *(-number for number in digest)])
    # Largest and smallest of all ranks, in one collective of fixed size; NCCL takes tensors of a GPU only.
    numbers = numbers.to(dist.distributed_c10d._get_object_coll_device(group))
    work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group, async_op=True)

    def end() -> None:
        work.wait()
        largest, smallest = numbers.view(2, -1).tolist()
        if largest == [-number for number in smallest]:
            return
        everyone: list[dict[str, str]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(everyone, shown, group)
        raise ValueError(_difference(everyone, rule))

    return end


def _difference(everyone: list[dict[str, str]], rule: str) -> str:
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                got, got_too = first.get(name, "none"), other.get(name, "none")
                return f"{name} {rule}, got {got} on rank 0 and {got_too} on rank {rank}"
    return f"the order of {', '.join(first)} {rule}"


def on_first(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `action` on the first rank of a group, whose ranks all call this; its result goes to all of them.

    Raises:
        OSError, ValueError, RuntimeError: on all ranks, as the action raised it (of other kinds: RuntimeError).
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return action()
    # Result, then kind and text of an error.
    told: list[Any] = [None, None, None]
    error = None
    if dist.get_rank(group) == 0:
        try:
            told[0] = action()
        except Exception as caught:
            error = caught
            told[1:] = next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), ""), str(error)
    dist.broadcast_object_list(told, group=group, group_src=0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise {kind.__name__: kind for kind in _KINDS}.get(told[1], RuntimeError)(told[2])
    return told[0]


_KINDS = (OSError, ValueError, RuntimeError)
