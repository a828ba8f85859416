"""NaN and Inf in training: noticed on the device, and traced to the module or the weights where they begin."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_NEVER = torch.iinfo(torch.int64).max


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a weight is not finite.

    Attributes:
        update: the first update that computed one, counted from 1.
    """

    def __init__(self, update: int):
        super().__init__(f"loss must stay finite, got NaN or Inf in update {update}")
        self.update = update


class FiniteWatch:
    """Remembers the first update that gave a number that is not finite; noting one does not wait for the device."""

    def __init__(self, device: torch.device):
        self._first = torch.full((), _NEVER, dtype=torch.int64, device=device)

    def note(self, value: Tensor, update: int) -> None:
        """One number (0-dim) of an update."""
        self._first = torch.where(value.detach().isfinite(), self._first, self._first.clamp(max=update))

    def first(self) -> int | None:
        """That update, if there was one; waits for the device."""
        first = int(self._first)
        return None if first == _NEVER else first


def weights_not_finite(model: nn.Module) -> list[str]:
    """Names of parameters of which this process holds a NaN or Inf; waits for the device once."""
    named = [(name, _local(parameter)) for name, parameter in model.named_parameters()]
    finite = torch.stack([weight.isfinite().all() for _, weight in named]).tolist() if named else []
    return [name for (name, _), good in zip(named, finite) if not good]


def explain(
    update: Callable[[list], Any],
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    gather: Callable[[Any], list] = lambda value: [value],
) -> str | None:
    """Runs an update again and says what in it is the first that is not finite, or None if all is finite.

    Args:
        update: of the batches of its accumulation steps.
        model: that it trains, as it was before the update.
        batches: (images, labels) of the update.
        gather: gives every process the values of all; the update is run by all of them or by none.
    """
    before = [reason for reason in gather(_before(model, batches)) if reason is not None]
    if before:
        return before[0]
    with _not_finite(model) as (modules, gradients):
        update(batches)
    if modules:
        return f"the output of {modules[0]} is the first that is not finite"
    if gradients:
        return f"its loss is finite, the gradient of {gradients[0]} is the first that is not"
    # FSDP's parameters get theirs from others, without hooks, and clipping has since spread a NaN to all.
    if not all(_local(p.grad).isfinite().all() for p in model.parameters() if p.grad is not None):
        return "its loss is finite, its gradients are not"
    broken = weights_not_finite(model)
    return f"its gradients are finite, {_some(broken)} is not after it" if broken else None


def _before(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> str | None:
    """What this process holds that is not finite before the update, if anything."""
    broken = weights_not_finite(model)
    if broken:
        return f"{_some(broken)} is not finite before it"
    return None if all(images.isfinite().all() for images, _ in batches) else "its images are not finite"


@contextmanager
def _not_finite(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Modules whose output is not finite, in the order in which they finish, and parameters whose gradient is not, in
    the order of the backward, before any clipping."""
    modules: list[str] = []
    gradients: list[str] = []

    def look_at_last(found: list[str], name: str) -> Callable[..., None]:
        """A hook of a module or of a tensor: what it is about, an output or a gradient, is its last argument."""

        def hook(*arguments: Any) -> None:
            if not all(tensor.isfinite().all() for tensor in _tensors(arguments[-1])):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look_at_last(modules, f"{name or 'the model'} ({type(module).__name__})"))
        for name, module in model.named_modules()
    ]
    handles += [
        p.register_hook(look_at_last(gradients, name)) for name, p in model.named_parameters() if p.requires_grad
    ]
    try:
        yield modules, gradients
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield _local(value)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
