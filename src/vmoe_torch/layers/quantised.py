"""Quantised weights as the floating-point tensors that they stand for."""

from torch import Tensor


def plain(weight: Tensor | None) -> Tensor | None:
    """A weight that our ops can read: a quantised one is dequantised, any other is returned as it is.

    Quantised weights are PyTorch's own, or tensor subclasses with a `dequantize` of their own, as torchao has them.
    """
    if weight is None:
        return None
    quantised = weight.is_quantized or type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if quantised else weight
