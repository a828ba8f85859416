"""The experts' weights as the Triton GEMMs read them: by pointers, or by descriptors that TMA follows."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vmoe_kernels.common.launch import Config


def tma_reads(weight: Tensor) -> bool:
    """Whether TMA, which needs a chip from sm_90 on and rows of whole 16-byte units, can read a weight (E, M, N)."""
    in_units = weight.data_ptr() % 16 == 0 and weight.shape[2] * weight.element_size() % 16 == 0 and weight.numel() > 0
    old_chip = weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (9, 0)
    return in_units and not old_chip


def weight_operand(weight: Tensor, config: Config, transposed: bool) -> tuple[Tensor | TensorDescriptor, dict]:
    """A weight as a kernel reads it, and the config's keyword arguments.

    A weight that TMA cannot read is read by pointers.
    """
    launch = config.kwargs()
    if not launch["TMA"] or not tma_reads(weight):
        return weight, {**launch, "TMA": False}
    return TensorDescriptor.from_tensor(weight, _weight_block(config, transposed)), launch


def _weight_block(config: Config, transposed: bool) -> list[int]:
    sizes = config.constexprs["BLOCK_COLS"], config.constexprs["BLOCK_IN"]
    return [1, *(reversed(sizes) if transposed else sizes)]
