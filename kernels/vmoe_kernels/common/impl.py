"""Which implementation answers a call: the registered op (Triton on CUDA, a fast loop on CPU) or the eager twin."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_kernels.common.card import IMPORT_FAULT, first_line, refusal
from vmoe_kernels.common.checks import MAX_EXPERTS, MAX_SELECTED, check_choices
from vmoe_kernels.common.transforms import carries_tangent, differentiating

IMPLS = ("auto", "triton", "reference")

HAS_TRITON = IMPORT_FAULT is None
# Under Triton's interpreter the kernels run on CPU tensors, in place of the CPU implementations.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


# Rows of the buffer that the Triton GEMMs take at once: in a dropless one, no tile may hold rows of two experts.
ROW_TILE = 128


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels are for tensors on a device."""
    return device.type == "cuda" or (INTERPRET and device.type == "cpu")


def row_tile(device: torch.device) -> int:
    """Rows at whose multiples an expert's part of a dropless buffer must begin on a device: a CPU's loops take any."""
    return ROW_TILE if has_kernels(device) else 1


class Choice(NamedTuple):
    """What `impl="auto"` is on a device, and why."""

    impl: str
    """ "triton", "cpu" for the loops that a CPU has, or "reference" for the eager twin."""
    reason: str
    """In words, to go after "because"."""


@functools.cache
def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """What answers a call with `impl="auto"`, transforms aside: never a kernel that the device cannot launch."""
    on_triton = has_kernels(device)
    if on_triton and dtype == torch.float64:
        return Choice("reference", "the Triton kernels accumulate in float32, too little for float64")
    if device.type == "cuda":
        fault = refusal(device)
        return Choice("triton", "the card can launch the kernels") if fault is None else Choice("reference", fault)
    if on_triton:
        return Choice("triton", "TRITON_INTERPRET=1 is set")
    if device.type in ("cpu", "meta"):
        return Choice("cpu", "the tensors are on a CPU")
    return Choice("reference", f"there are no kernels for {device.type}")


def takes_twin(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `impl="auto"` is the eager twin there; where a card is the reason, a warning says so once."""
    choice = choose(device, dtype)
    if choice.impl == "reference" and dtype != torch.float64:
        warn_once(device, choice.reason)
    return choice.impl == "reference"


# As transforms.differentiating: a compiler asks when it traces, and the answer holds for the process.
takes_twin._dynamo_marked_constant = True


def _is_too_wide(device: torch.device, num_experts: int, num_choices: int) -> bool:
    """Whether a routing is more than the Triton kernels hold in registers; then a warning says so once."""
    if num_experts <= MAX_EXPERTS and num_choices <= MAX_SELECTED:
        return False
    warn_once(
        device,
        f"the routing kernels take at most {MAX_EXPERTS} experts and {MAX_SELECTED} of them for a token, got "
        f"{num_experts} and {num_choices} (choices below a threshold count as one expert more)",
    )
    return True


_is_too_wide._dynamo_marked_constant = True


@functools.cache
def warn_once(device: torch.device, reason: str) -> None:
    """Says for what reason a device has plain PyTorch."""
    warnings.warn(
        f"impl='auto' is plain PyTorch on {device}: {reason}. `vmoe doctor` tells more; impl='reference' asks for the "
        "same without a warning",
        stacklevel=4,
    )


def register_triton(op, launcher: Callable) -> None:
    """Makes `launcher` the CUDA kernel of a custom op, and its CPU kernel under the interpreter."""
    from triton.errors import TritonError

    @functools.wraps(launcher)
    def on_its_device(first: Tensor, *args):
        # Triton launches on the current device, which need not be the tensors' own.
        with torch.cuda.device(first.device):
            try:
                return launcher(first, *args)
            except TritonError as error:
                raise RuntimeError(
                    f"a Triton kernel of this call cannot run on {first.device} ({first_line(error)}): "
                    "impl='reference' does without it, and `vmoe doctor` writes what a report of the fault needs"
                ) from error

    op.register_kernel("cuda")(on_its_device)
    if INTERPRET:
        op.register_kernel("cpu")(launcher)


def use_reference(impl: str, x: Tensor, *others: Tensor | None, routing: tuple[int, int] | None = None) -> bool:
    """Decides whether a call on `x` runs the eager twin; an explicit request never falls back in silence.

    `others` are the remaining inputs that may be differentiated: what the registered ops cannot do is the twin's.
    `routing` is E and K of an op that routes: the twin has no limit for them.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl == "reference":
        return True
    if differentiating() or carries_tangent(x, *others):
        if impl == "auto":
            return True
        raise ValueError(
            f"impl must be 'reference' or 'auto' under forward-mode AD and torch.func's gradients, got {impl!r}"
        )
    on_triton = has_kernels(x.device)
    if impl == "triton":
        if not HAS_TRITON or not on_triton:
            raise ValueError(f"impl='triton' needs Triton and a CUDA tensor, got a tensor on {x.device}")
        if x.dtype == torch.float64:
            raise ValueError("impl='triton' takes float16, bfloat16 and float32, got float64")
    if on_triton and INTERPRET and x.dtype == torch.bfloat16:
        raise ValueError(
            "dtype must be float16 or float32 under TRITON_INTERPRET=1, got bfloat16, with whose bits Triton's "
            "interpreter computes as with integers; impl='reference' takes it"
        )
    if impl == "triton":
        return False
    return takes_twin(x.device, x.dtype) or (on_triton and routing is not None and _is_too_wide(x.device, *routing))


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, so that what it needs must be kept."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def no_autocast(fn: Callable) -> Callable:
    """Runs an implementation as its dtypes say: an enclosing autocast would narrow its float32 accumulation."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
        if device.type not in ("cpu", "cuda"):
            return fn(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return fn(*args, **kwargs)

    return wrapped


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(**tensors: Tensor | None) -> None:
    """All given tensors are floating point and on one device; the first one names the device."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {next(iter(tensors))}, got {tensor.device}")


def check_dtypes(x: Tensor, **tensors: Tensor | None) -> None:
    """All given tensors have the dtype of `x`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")


def check_slots(slots: Tensor, num_tokens: int, device: torch.device) -> None:
    """Slots are (T, K) int32 on the device of the data."""
    if slots.dtype != torch.int32:
        raise ValueError(f"slots must be int32, got {slots.dtype}")
    if slots.ndim != 2 or slots.shape[0] != num_tokens:
        raise ValueError(f"slots must be (T, K) with T={num_tokens}, got {tuple(slots.shape)}")
    if slots.device != device:
        raise ValueError(f"slots must be on {device}, got {slots.device}")
    check_choices(slots)
