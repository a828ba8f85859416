"""What a MoE layer remembers of its last forward, for statistics and for adding the auxiliary loss by hand."""

import torch
from torch import Tensor


class Record:
    """References to a layer's last routing: no computation, and empty in copies, so deepcopy, EMA and pickling work."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.gates: Tensor | None = None  # (T, K)
        self.experts: Tensor | None = None  # (T, K) int32
        self.slots: Tensor | None = None  # (T, K) int32, -1 where dropped
        self.importance: Tensor | None = None  # (G, E)
        self.load: Tensor | None = None  # (G, E)
        self.mean_gates: Tensor | None = None  # (G, E)
        self.top1_share: Tensor | None = None  # (G, E)
        self.loss: Tensor | None = None  # 0-dim; part of the graph in the "manual" mode
        self.group_tokens = 0
        self.images = 0

    def leave_transforms(self) -> None:
        """Keeps what is inside the tensors of `torch.func`'s transforms, which mean nothing once these are left.

        The samples of `vmap` follow each other, as if they had been routed in one batch. A loss that is part of the
        graph stays: it belongs into the transformed function.
        """
        if torch.compiler.is_compiling():
            return
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and not (name == "loss" and value.requires_grad):
                setattr(self, name, _unwrapped(value))

    def has_values(self) -> bool:
        """Whether numbers can be read: not after a forward on the meta device or with fake tensors."""
        return self.slots is not None and self.slots.device.type != "meta" and type(self.slots) is Tensor

    def __deepcopy__(self, memo) -> "Record":
        return Record()

    def __reduce__(self):
        return (Record, ())


def _unwrapped(value: Tensor) -> Tensor:
    functorch = torch._C._functorch
    # Private, but the public `torch.func.debug_unwrap` does not say which dimension holds the samples.
    while functorch.is_functorch_wrapped_tensor(value):
        dim = functorch.maybe_get_bdim(value) if functorch.is_batchedtensor(value) else None
        value = functorch.get_unwrapped(value)
        if dim is not None and dim >= 0:
            value = value.movedim(dim, 0)
            value = value.flatten(0, 1) if value.ndim > 1 else value.mean()
    return value
