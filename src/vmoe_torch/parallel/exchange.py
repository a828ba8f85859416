"""The expert exchange: rows of the buffer travel to the rank that holds their expert, and back.

Capacity is fixed, so the splits are equal: no sizes are negotiated, no host synchronisation happens, and every rank
runs every collective, forward and backward, whatever its tokens did.

Dims: E experts, N ranks, R rows per expert and rank, D width.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor import DTensor

from vmoe_torch.parallel.mesh import keep_timeout


class ExpertExchange:
    """All-to-all over the ranks of one set of experts.

    Args:
        group: process group of the N ranks; rank i holds experts i * E / N .. (i + 1) * E / N - 1.
        wire_dtype: dtype on the wire; None is that of the rows.
        chunks: the rows are cut into so many parts along the capacity, so that the exchange of one part overlaps the
            experts' work on another.
        ranks_per_node: 0 is one all-to-all; M > 1 is two, inside a node of M ranks and then between nodes, which sends
            fewer and larger messages over the slower links.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wire_dtype: torch.dtype | None = None,
        chunks: int = 1,
        ranks_per_node: int = 0,
    ):
        size = dist.get_world_size(group)
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {chunks}")
        if ranks_per_node < 0 or (ranks_per_node > 1 and size % ranks_per_node):
            raise ValueError(f"ranks_per_node must divide the {size} ranks of the experts, got {ranks_per_node}")
        self.group, self.size = group, size
        self.wire_dtype, self.chunks = wire_dtype, chunks
        self.levels = _two_levels(group, ranks_per_node) if 1 < ranks_per_node < size else None

    def __deepcopy__(self, memo) -> "ExpertExchange":
        # A process group cannot be copied; a copy of the model talks over the same one.
        return self

    def local(self, weight: Tensor) -> Tensor:
        """This rank's part of a weight: its experts, or the whole router.

        The gradient is averaged as one process would average over the ranks' images. An expert has summed over the N
        ranks already, and FSDP averages over the sets of experts. A router has seen its own rank's images only, and is
        the same on all ranks of all sets.
        """
        if not isinstance(weight, DTensor):
            return weight
        if any(placement.is_shard() for placement in weight.placements):
            return _ScaledGradient.apply(weight.to_local(), 1.0 / self.size)
        return _AveragedGradient.apply(weight.to_local(grad_placements=weight.placements))

    def run(self, buffer: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
        """Sends rows to their experts, runs these, and brings the results back.

        Args:
            buffer: (E, R, D) rows of this rank for all experts; R is the same on every rank.
            experts: runs this rank's experts, (E / N, N * r, D) -> (E / N, N * r, O).

        Returns:
            (E, R, O).
        """
        parts = buffer.tensor_split(min(self.chunks, max(buffer.shape[1], 1)), dim=1)
        # Every part is on its way before the first is worked on; a part is waited for when it is used.
        arriving = [self._send(part) for part in parts]
        returning = [self._send_back(experts(self._arrived(part))) for part in arriving]
        return torch.cat([part.to(buffer.dtype) for part in returning], dim=1)

    def _send(self, rows: Tensor) -> tuple[Tensor, torch.dtype]:
        """(E, r, D) -> (N, E / N, r, D) by source rank."""
        wire = rows.to(self.wire_dtype or rows.dtype).contiguous()
        # The experts of a rank by number: without rows, torch could not tell how many they are.
        return self._all_to_all(wire.unflatten(0, (self.size, len(wire) // self.size))), rows.dtype

    def _arrived(self, sent: tuple[Tensor, torch.dtype]) -> Tensor:
        """(N, E / N, r, D) -> (E / N, N * r, D)."""
        rows, dtype = sent
        return rearrange(rows, "n e r d -> e (n r) d").to(dtype)

    def _send_back(self, rows: Tensor) -> Tensor:
        """(E / N, N * r, O) -> (E, r, O)."""
        rows = rearrange(rows.to(self.wire_dtype or rows.dtype), "e (n r) o -> n e r o", n=self.size)
        return rearrange(self._all_to_all(rows.contiguous()), "n e r o -> (n e) r o")

    def _all_to_all(self, rows: Tensor) -> Tensor:
        """(N, ...) by destination -> (N, ...) by source."""
        if self.levels is None:
            return _all_to_all(rows, self.group)
        inside, between, per_node = self.levels
        by_peer = rearrange(rows, "(node peer) ... -> peer node ...", peer=per_node).contiguous()
        by_node = rearrange(_all_to_all(by_peer, inside), "peer node ... -> node peer ...").contiguous()
        return rearrange(_all_to_all(by_node, between), "node peer ... -> (node peer) ...")


class _ScaledGradient(torch.autograd.Function):
    """Identity whose backward multiplies by a constant."""

    @staticmethod
    def forward(ctx, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class _AveragedGradient(torch.autograd.Function):
    """Identity whose backward averages over all ranks."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        summed = collectives.all_reduce(grad.contiguous(), "sum", dist.group.WORLD)
        return collectives.wait_tensor(summed) / dist.get_world_size()


def _all_to_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    return collectives.all_to_all_single_autograd(rows, None, None, group)


def _two_levels(group: dist.ProcessGroup, per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup, int]:
    """Groups of this rank inside its node and between nodes; every rank of the world must call this."""
    ranks = torch.tensor(dist.get_process_group_ranks(group))
    # Other expert groups build theirs in the same calls.
    everybody: list[list[int]] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, ranks.tolist())
    inside = between = None
    for members in sorted({tuple(members) for members in everybody}):
        table = torch.tensor(members).view(-1, per_node)
        for row in table.tolist():
            created = dist.new_group(row)
            inside = created if dist.get_rank() in row else inside
        for column in table.t().tolist():
            created = dist.new_group(column)
            between = created if dist.get_rank() in column else between
    return keep_timeout(inside), keep_timeout(between), per_node
