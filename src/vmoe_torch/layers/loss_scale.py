"""A followed loss tells the layers under it by what the loop multiplied it.

`follow_loss_scale(loss)` puts a hook on the loss. In the backward, the gradient that arrives there is what the loop
multiplied the loss by; the hook leaves it on those nodes of the loss's own graph that are written in Python, for only
from such a node can a layer inject: its own, a compiled region's or a reentrant checkpoint's. So every loss speaks for
the layers under it and for its own backward, whatever other threads, models and losses do.

A recomputed forward makes a graph of its own, with a backward of its own, inside a node of the outer backward: that
node is then the owner of what the inner one injects.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from math import inf
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.autograd.variable import Variable

_UNIT = torch.float32


class _Scale(NamedTuple):
    """What a followed loss says in one backward."""

    task: int
    value: Tensor | None  # 0-dim; None injects nothing
    captured: bool  # whether it was computed inside a CUDA graph


class _Buffers(NamedTuple):
    """0-dim float32 scales of one device."""

    unfollowed: Tensor  # of losses that nobody follows
    running: Tensor  # of the backward that runs: what a CUDA graph that holds only a part of it can read


class _Recomputation:
    """Called by the engine when the outer backward ends, and freed with it, also where it fails."""

    def __init__(self, owner: Node, task: int):
        self.owner, self.task = owner, task

    def __call__(self) -> None:
        pass


BUFFERS: dict[torch.device, _Buffers] = {}
_local = threading.local()
# Whether a loop set the scale of unfollowed losses by hand, and so knows of it.
_is_set_by_hand = False


def buffers(device: torch.device) -> _Buffers:
    """The scales of a device; 1 until somebody says otherwise."""
    if device.index is None and device.type != "cpu":
        # "cuda" is the current one; tensors name theirs by number.
        device = torch.empty(0, device=device).device
    if device not in BUFFERS:
        BUFFERS[device] = _Buffers(*(torch.ones((), device=device, dtype=_UNIT) for _ in _Buffers._fields))
    return BUFFERS[device]


def auxiliary_gradient_scale(device: torch.device) -> Tensor:
    """The 0-dim float32 gradient that an auxiliary loss on this device gets under a loss that is not followed."""
    return buffers(device).unfollowed


def set_auxiliary_gradient_scale(scale: Tensor | float, device: torch.device | None = None) -> None:
    """Sets the scale of losses that are not followed, for all threads: `vmoe_torch.follow_loss_scale` needs no such
    state. In place, without a host synchronisation when it is a tensor on the device.
    """
    global _is_set_by_hand
    is_tensor = isinstance(scale, Tensor)
    _is_set_by_hand = is_tensor or scale != 1
    with torch.no_grad():
        for buffer in buffers(scale.device if is_tensor else torch.device(device or "cpu")):
            buffer.copy_(scale) if is_tensor else buffer.fill_(scale)


def is_set_by_hand() -> bool:
    """Whether the last scale set by `set_auxiliary_gradient_scale` was another than the number 1."""
    return _is_set_by_hand


class _Follower:
    """The hook on a loss. Weak references: the graph must not hold itself."""

    def __init__(self, loss: Tensor, weight: float):
        self.nodes = [weakref.ref(node) for node in nodes_beneath(loss.grad_fn) if isinstance(node, BackwardCFunction)]
        self.weight = weight
        self.version = loss._version

    def __call__(self, gradient: Tensor) -> None:
        value = None
        if self.weight > 0:
            value = gradient.detach().reshape(())
            value = value.to(torch.promote_types(value.dtype, _UNIT)) * self.weight
        scale = _Scale(torch._C._current_graph_task_id(), value, is_capturing(gradient.device))
        for reference in self.nodes:
            node = reference()
            if node is not None:
                node.vmoe_scale = scale
        buffers(gradient.device)
        for _, running in list(BUFFERS.values()):
            running.zero_() if value is None else running.copy_(value, non_blocking=True)
        Variable._execution_engine.queue_callback(_end)


def _end() -> None:
    for unfollowed, running in list(BUFFERS.values()):
        running.copy_(unfollowed)


def follow_loss_scale(loss: Tensor, weight: float = 1.0) -> None:
    """Makes the auxiliary losses count as terms of this loss, whatever the loop multiplies it by before the backward.

    For a loop that divides the loss by its accumulation steps, or scales it for float16:

        loss = criterion(model(images), labels)
        vmoe_torch.follow_loss_scale(loss)
        scaler.scale(loss / steps).backward()

    Call it before the loop multiplies, on every loss that gets a backward. It holds for the layers whose output the
    loss is made of, in the backward that the loss takes part in. In a loop that multiplies by nothing it changes
    nothing. A loss that is followed already stays as it is; of a followed loss and a followed part of it, the part
    counts for the layers under it.

    Args:
        loss: of one element; nothing happens if it needs no gradient.
        weight: of the auxiliary losses, times their own; 0 gives a backward without them, e.g. for gradients of the
            input, and leaves them to the next backward through the same forward.

    Raises:
        TypeError: if the loss is no tensor or the weight no number.
        ValueError: if the loss has not one real element, or the weight is negative or not finite.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(f"loss must have one real element, got {loss.dtype} of shape {tuple(loss.shape)}")
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"weight must be a number, got {weight!r}")
    if not 0 <= weight < inf:
        raise ValueError(f"weight must be finite and at least 0, got {weight}")
    if not loss.requires_grad:
        return
    hooks = (getattr(loss, "_backward_hooks", None) or {}).values()
    # An operation in place makes another loss of the same tensor.
    if any(isinstance(hook, _Follower) and hook.version == loss._version for hook in hooks):
        return
    loss.register_hook(_Follower(loss, float(weight)))


def note_recomputation() -> None:
    """To call in a forward: if it runs inside a backward, that one's node owns what the inner backward injects."""
    node = torch._C._current_autograd_node()
    if node is None:
        return
    owner, task = owner_of(node)
    known = outer_recomputation()
    if known is None or known.owner is not owner or known.task != task:
        recomputation = _Recomputation(owner, task)
        Variable._execution_engine.queue_callback(recomputation)
        _local.outer = weakref.ref(recomputation)


def owner_of(node: Node) -> tuple[Node, int]:
    """The node of the outermost backward that this one runs for, and that backward's number."""
    task = torch._C._current_graph_task_id()
    outer = outer_recomputation()
    return (node, task) if outer is None or outer.task == task else (outer.owner, outer.task)


def outer_recomputation() -> _Recomputation | None:
    reference = getattr(_local, "outer", None)
    return None if reference is None else reference()


def scale_of(owner: Node, task: int) -> _Scale | None:
    """What a followed loss left on the node in this backward."""
    scale = getattr(owner, "vmoe_scale", None)
    return scale if scale is not None and scale.task == task else None


def running_scale(device: torch.device) -> Tensor:
    """0-dim float32 buffer that holds the scale of the running backward, always at the same address."""
    return buffers(device).running


def computed_parameter(root: Node) -> nn.Parameter | None:
    """The nearest parameter at or beneath a node whose gradient the running backward computes."""
    return next((leaf.variable for leaf in _parameters(root) if is_computed(leaf)), None)


def has_parameter(root: Node) -> bool:
    """Whether a parameter is at or beneath a node."""
    return next(_parameters(root), None) is not None


def _parameters(root: Node) -> Iterator[Node]:
    return (node for node in nodes_beneath(root) if isinstance(getattr(node, "variable", None), nn.Parameter))


def is_computed(node: Node) -> bool:
    """Whether the running backward goes to this node: not where only other inputs' gradients were asked for."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # The engine's answer for a leaf that `torch.autograd.grad` was asked for itself.
        return True


def nodes_beneath(root: Node | None) -> Iterator[Node]:
    """The nodes of a graph from its root, nearest first."""
    queue = deque([root])
    seen = {None, root}
    while queue:
        node = queue.popleft()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                queue.append(following)


def is_capturing(device: torch.device) -> bool:
    """Whether what is computed on this device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
