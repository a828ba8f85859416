"""What the registered ops leave to their eager twins: forward-mode AD, torch.func's gradients, second derivatives.

A custom op knows its values, its gradient and its batching rule. The twins are plain PyTorch, so every transform of
PyTorch is right on them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Without these private names (they are in torch 2.11 to 2.14) the ops answer as if no transform were active.
_stack = getattr(torch._C._functorch, "get_interpreter_stack", tuple)


def _active(*names: str) -> bool:
    """Whether one of torch.func's transforms, of all that enclose the call, has one of these names."""
    return any(interpreter.key().name in names for interpreter in _stack() or ())


def differentiating() -> bool:
    """Whether torch.func's grad, vjp, jvp or what is made of them encloses the call."""
    return _active("Grad", "Jvp")


# As torch.compiler.assume_constant_result marks it, which would import all of the compiler: torch.compile traces what
# torch.func calls in a compiled function anew for every transform.
differentiating._dynamo_marked_constant = True


def transformed() -> bool:
    """Whether any of torch.func's transforms encloses the call."""
    return bool(_stack())


transformed._dynamo_marked_constant = True


def carries_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor is dual: forward-mode AD asks for its derivative."""
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def differs_backward() -> bool:
    """Inside a backward: whether it is differentiated itself (create_graph=True) or runs under vmap."""
    return torch.is_grad_enabled() or _active("Grad", "Jvp", "Vmap")


def twin_gradients(
    twin: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    d_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The backward of an op through its twin, itself differentiable.

    Args:
        twin: called with `inputs`; returns one output for each of `d_outputs`.
        inputs: what the gradients are of; None and tensors without requires_grad have none.
        d_outputs: gradients of the outputs; None is zero.

    Returns:
        One gradient for each input, or None.
    """
    create_graph = torch.is_grad_enabled()
    wanted = [each is not None and each.requires_grad for each in inputs]
    with torch.enable_grad():
        # Aliases, so that an input given twice has two gradients.
        inputs = [each.view_as(each) if want else each for each, want in zip(inputs, wanted)]
        outputs = twin(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        pairs = [(y, d_y) for y, d_y in zip(outputs, d_outputs) if d_y is not None and y.requires_grad]
        if not pairs or not any(wanted):
            return [None] * len(inputs)
        leaves = [each for each, want in zip(inputs, wanted) if want]
        outputs, d_outputs = zip(*pairs)
        gradients = iter(torch.autograd.grad(outputs, leaves, d_outputs, create_graph=create_graph, allow_unused=True))
    return [next(gradients) if want else None for want in wanted]
