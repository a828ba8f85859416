"""The rows that the Triton GEMMs of the experts work on: which of them hold something, whose they are, where they lie.

Dims: E experts, R rows of a part of the buffer, T tokens, K choices per token, W columns.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vmoe_kernels.common.impl import ROW_TILE
from vmoe_kernels.rows.triton_move import dispatch_triton


@dataclass(frozen=True)
class Buffer:
    """Which rows of the experts' buffers hold something: all of them, or those that a choice names."""

    num_experts: int
    """E, number of experts."""
    rows: int
    """R, rows of a part: of each expert, or of all of them together where they have spans."""
    slots: Tensor | None = None
    """(T, K) int32 row of each choice, or -1 where dropped."""
    choices: Tensor | None = None
    """(E * R,) int32, the inverse of slots."""
    spans: Tensor | None = None
    """(2, E) int32 first row of each expert, a multiple of ROW_TILE, and the row past its last, or None."""

    @property
    def parts(self) -> int:
        """Parts of R rows: the experts, or 1."""
        return self.num_experts if self.spans is None else 1

    @property
    def rows_of_expert(self) -> int:
        """R, or the mean of what the experts have."""
        return self.rows if self.spans is None else self.slots.numel() // self.num_experts

    @property
    def mostly_filled(self) -> bool:
        """Whether the choices, if none is dropped, fill four rows of five of those that experts have."""
        return self.slots is None or self.spans is not None or 5 * self.slots.numel() >= 4 * self.parts * self.rows

    @property
    def end(self) -> Tensor | None:
        """() int32 row past those that experts have, or None where that is all of the buffer."""
        return None if self.spans is None else self.spans[1, -1]

    @cached_property
    def owners(self) -> Tensor | None:
        """(R / ROW_TILE,) int32 expert of each tile; behind the last expert's rows, any."""
        if self.spans is None:
            return None
        places = torch.arange(0, self.rows, ROW_TILE, device=self.spans.device, dtype=torch.int32)
        # An expert without rows begins where the next one does.
        return torch.searchsorted(self.spans[0, 1:], places, right=True, out_int32=True)

    @property
    def num_choices(self) -> int:
        """K, or 1 where every row counts."""
        return 1 if self.slots is None else self.slots.shape[1]


@dataclass(frozen=True)
class Rows:
    """The left operand of a GEMM: a buffer (E * R, W) as it lies, or the tokens (T, W) that its rows hold."""

    data: Tensor
    """(E * R, W) as the buffer lies, or (T, W) tokens."""
    buffer: Buffer
    """Which rows hold something."""
    gather: bool = False
    """Whether `data` is the tokens."""

    @cached_property
    def gathered(self) -> Tensor:
        """(E, R, W) in memory, as cuBLAS wants it; empty rows of gathered tokens are 0."""
        data = self.data
        if self.gather:
            data = dispatch_triton(data, self.buffer.slots, self.buffer.parts * self.buffer.rows)
        return data.view(self.buffer.parts, self.buffer.rows, data.shape[-1])
