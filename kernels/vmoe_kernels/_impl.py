"""Which implementation answers a call: the registered op (Triton on CUDA, a fast loop on CPU) or the eager twin."""

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")

# Nobody registers Triton kernels yet: CUDA tensors go through the eager twins, and an explicit "triton" is refused.
HAS_TRITON_KERNELS = False


def use_reference(impl: str, x: Tensor) -> bool:
    """Decides whether a call on `x` runs the eager twin; an explicit request never falls back in silence."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl == "reference":
        return True
    if impl == "triton":
        if not HAS_TRITON_KERNELS or x.device.type != "cuda":
            raise ValueError(f"impl='triton' needs Triton kernels and a CUDA tensor, got a tensor on {x.device}")
        return False
    return x.device.type == "cuda" and not HAS_TRITON_KERNELS


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


def check_slots(slots: Tensor, num_tokens: int, device: torch.device) -> None:
    """Slots are (T, K) int32 on the device of the data."""
    if slots.dtype != torch.int32:
        raise ValueError(f"slots must be int32, got {slots.dtype}")
    if slots.ndim != 2 or slots.shape[0] != num_tokens:
        raise ValueError(f"slots must be (T, K) with T={num_tokens}, got {tuple(slots.shape)}")
    if slots.device != device:
        raise ValueError(f"slots must be on {device}, got {slots.device}")
