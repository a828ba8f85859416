"""Whether PyTorch's operators are being recorded by a tracer, and forms of single operators that a record can hold."""

import warnings

import torch
from torch import Tensor


def is_recorded() -> bool:
    """Whether operators are being recorded, and ours would mean nothing to the reader."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def static_sizes(x: Tensor) -> list:
    """The shape as numbers: those of a traced tensor are tensors, and become constants of the trace."""
    if not torch.jit.is_tracing():
        return list(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return [int(size) for size in x.shape]


def descending(values: Tensor, dim: int, count: int) -> Tensor:
    """The indices that sort `count` values along a dimension, largest first, equal ones in order."""
    if torch.onnx.is_in_onnx_export():
        # By its definition ONNX's TopK puts the lower index first where values are equal; it has no stable sort.
        return values.topk(count, dim).indices
    return values.sort(dim=dim, descending=True, stable=True).indices
