"""What a MoE layer remembers of its last forward, for statistics and for adding the auxiliary loss by hand."""

import weakref

import torch
from torch import Tensor

from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.routers.base import Routed

# What a router may give beside gates and slots.
_OF_ROUTERS = ("experts", "selected", "importance", "load", "mean_gates", "top1_share")


class Record:
    """References to a layer's last routing: no computation, and empty in copies, so deepcopy, EMA and pickling work.

    In the "manual" mode several forwards may wait for one reading of their losses. All but the last are kept alive by
    the graphs of their outputs alone, so that what nobody uses is freed.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.gates: Tensor | None = None  # (T, K)
        self.experts: Tensor | None = None  # (T, K) int32
        self.slots: Tensor | None = None  # (T, K) int32, -1 where dropped
        self.selected: Tensor | None = None  # (T, K) bool, choices above a threshold; None is all
        self.importance: Tensor | None = None  # (G, E)
        self.load: Tensor | None = None  # (G, E)
        self.mean_gates: Tensor | None = None  # (G, E)
        self.top1_share: Tensor | None = None  # (G, E)
        self.loss: Tensor | None = None  # 0-dim; part of the graph in the "manual" mode
        self.spans: Tensor | None = None  # (2, E) int32 of dropless slots
        self.groups: Groups | None = None
        self.losses: list[weakref.ref[Tensor]] = []  # of the forwards that `waiting` adds up
        self.is_closed = False  # whether the next forward starts a new sum

    def keep(self, gates: Tensor, loss: Tensor | None) -> Tensor:
        """To call in every forward: notes a loss that waits for a reading; returns the gates to use.

        The first forward after a reading, or after a backward, starts anew.

        Args:
            gates: (T, K), on the path to the output of the layer.
            loss: 0-dim, or None; waits if it has a graph.
        """
        if torch._C._current_autograd_node() is not None:
            # Recomputed in a backward: the forward itself has been here.
            return gates
        if self.is_closed:
            self.losses, self.is_closed = [], False
        self.losses = [reference for reference in self.losses if reference() is not None]
        if loss is None or not (loss.requires_grad and gates.requires_grad):
            return gates
        self.losses.append(weakref.ref(loss))
        # The hook is off the loss's own graph: no cycle.
        gates = gates.view_as(gates)
        gates.register_hook(_Keeper(loss, self))
        return gates

    def note(self, routed: Routed, groups: Groups) -> None:
        """To call after `keep`: what a router did, off the graph but for a loss that waits."""
        self.gates, self.slots, self.groups = _off_graph(routed.record.get("gates", routed.gates)), routed.slots, groups
        self.spans = routed.spans
        for name in _OF_ROUTERS:
            setattr(self, name, _off_graph(routed.record.get(name)))
        self.loss = routed.record.get("loss")
        self.leave_transforms()

    def kept_experts(self) -> Tensor:
        """(N,) int64 experts of the choices that were processed, token by token; not of mixtures, which choose none."""
        kept = self.slots >= 0
        if self.experts is not None:
            return self.experts[kept].long()
        # A router without choices has rows with capacities, expert by expert.
        return self.slots[kept].long() // max(self.groups.rows, 1)

    def num_slots(self, num_experts: int) -> int:
        """Slots that the experts had, used or not; without capacities as many as choices that wanted one."""
        if self.spans is None:
            return num_experts * self.groups.rows
        return self.slots.numel() if self.selected is None else int(self.selected.sum())

    def waiting(self) -> Tensor | None:
        """0-dim sum of the losses that wait for a reading, or None; again the same until the next forward.

        A reading with gradients on takes them: the next forward starts a new sum.
        """
        losses = [loss for reference in self.losses if (loss := reference()) is not None]
        if losses and self.loss is not None and self.loss.requires_grad:
            # Who parallelises the model may have put another of the same value in the last one's place.
            losses[-1] = self.loss
        self.is_closed |= torch.is_grad_enabled()
        return torch.stack(losses).sum() if losses else None

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


class _Keeper:
    """Keeps a loss alive as long as the graph of its layer's output, and notes the backward."""

    def __init__(self, loss: Tensor, record: Record):
        self.loss, self.record = loss, weakref.ref(record)

    def __call__(self, gradient: Tensor) -> None:
        record = self.record()
        if record is not None:
            record.is_closed = True


def _off_graph(value: Tensor | None) -> Tensor | None:
    return value.detach() if value is not None and value.requires_grad else value


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
