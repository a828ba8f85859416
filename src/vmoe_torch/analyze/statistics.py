"""Routing statistics over a data set, and which patches of an image the experts processed.

Counts only, so memory does not grow with the images.

Dims: B images, L tokens per image (class and register tokens first), K choices per token, E experts, N classes.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.data.clips import frames_of_a_tubelet
from vmoe_torch.layers import MoeMlp


@dataclass
class LayerRouting:
    """What one MoE layer did with every token of a data set."""

    wanted: Tensor
    """(N, E) int64, choices that tokens of a class's images made, kept or not."""
    kept: Tensor
    """(N, E) int64, those that found a free slot."""
    gates: Tensor
    """(K, bins) int64, histogram over 0..1 of the gates of each choice rank."""
    tokens: int = 0
    """Number of tokens."""
    unprocessed: int = 0
    """Number of tokens whose choices were all dropped."""
    slots: int = 0
    """Number of slots there were, used or not."""
    positions: Tensor | None = None
    """(rows, columns, E) int64, choices of patches that found a slot, by the patch's place in the image, or in all
    frames of a clip; None for a model without a grid of patches."""
    numbers: Tensor | None = None
    """(K + 1,) int64, tokens by the number of experts that processed them; None where it was not counted."""

    @property
    def demand(self) -> Tensor:
        """(E,) choices that wanted each expert, kept or not, over the balanced number."""
        wanted = self.wanted.sum(0)
        return wanted * len(wanted) / wanted.sum().clamp(min=1)

    @property
    def capacity_factor(self) -> float:
        """Slots over choices: the capacity factor after its rounding."""
        return self.slots / max(int(self.wanted.sum()), 1)

    @property
    def load(self) -> Tensor:
        """(E,) share of the kept choices that each expert processed."""
        return self.kept.sum(0) / self.kept.sum().clamp(min=1)

    @property
    def dropped(self) -> float:
        """Share of all choices that were dropped, of those that a threshold lets through where there is one."""
        wanted = self.wanted.sum()
        return float((wanted - self.kept.sum()) / wanted.clamp(min=1))

    @property
    def expert_share(self) -> Tensor:
        """(N, E) share of a class's kept choices that went to each expert; 0 for a class without any."""
        return self.kept / self.kept.sum(1, keepdim=True).clamp(min=1)

    @property
    def class_dependence(self) -> Tensor:
        """(N,) share of a class's kept choices that would have to move for it to use the experts as all classes do."""
        return dependence(self.kept)

    @property
    def position_dependence(self) -> float:
        """The same for places in the image, averaged over them; NaN without a grid of patches."""
        if self.positions is None:
            return float("nan")
        counts = self.positions.flatten(0, 1)
        return float((dependence(counts) * counts.sum(1)).sum() / counts.sum().clamp(min=1))

    def gate_quantiles(self, *quantiles: float) -> Tensor:
        """(K, len(quantiles)) of the gates of each choice rank, to a bin's width; NaN where nothing was counted."""
        bins = self.gates.shape[1]
        total = self.gates.sum(1, keepdim=True).double()
        shares = torch.cat([torch.zeros_like(total), self.gates.double().cumsum(1) / total.clamp(min=1)], 1)
        found = torch.full((len(self.gates), len(quantiles)), torch.nan)
        for rank in total.squeeze(1).nonzero().flatten().tolist():
            for column, quantile in enumerate(quantiles):
                upper = int(torch.searchsorted(shares[rank], quantile).clamp(1, bins))
                low, high = shares[rank, upper - 1 : upper + 1].tolist()
                found[rank, column] = (upper - 1 + (quantile - low) / max(high - low, 1e-12)) / bins
        return found


def dependence(counts: Tensor) -> Tensor:
    """How far each row's spread over the columns is from that of all rows together.

    Args:
        counts: (N, E), at least 0.

    Returns:
        (N,) total variation distance in 0..1: the share of the row's counts that would have to move. 0 for empty rows.
    """
    totals = counts.sum(1, keepdim=True)
    everywhere = counts.sum(0) / counts.sum().clamp(min=1)
    return torch.where(totals > 0, (counts / totals.clamp(min=1) - everywhere).abs(), 0.0).sum(1) / 2


def routed_layers(model: nn.Module) -> dict[str, MoeMlp]:
    """The MoE layers whose choices can be counted: all there are.

    Raises:
        ValueError: if there is none, or one has no choices per token.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    for name, layer in layers.items():
        if layer.router_type not in ("top_experts", "threshold"):
            raise ValueError(f"{name} must route by top_experts or threshold, got {layer.router_type}")
    return layers


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, ...] | None:
    """Rows and columns of patches of images (B, C, H, W), before them the layers in time of clips (B, C, T, H, W); None
    for a model that makes none."""
    embed = getattr(model, "patch_embed", None)
    if embed is None or images.ndim == 4:
        return None if embed is None else tuple(embed.dynamic_feat_size(tuple(images.shape[-2:])))
    height, width = embed.patch_size[-2:]
    return images.shape[2] // frames_of_a_tubelet(model), images.shape[3] // height, images.shape[4] // width


@torch.no_grad()
def collect_routing(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    bins: int = 50,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, LayerRouting]:
    """Collects what every MoE layer does over a data set, at the routing that is set, in eval mode.

    Args:
        model: any module with MoE layers routed by top experts or threshold.
        loader: batches of images (B, C, H, W) and labels (B,) int64 below `num_classes`.
        num_classes: N.
        bins: of the gate histograms.
        progress: wraps the loader, e.g. `tqdm`.

    Returns:
        {layer name: LayerRouting, on the CPU}, in the order of the layers.

    Raises:
        ValueError: if the model has no MoE layer or one that has no choices per token to count, or a label is not
            below `num_classes`.
    """
    layers = routed_layers(model)
    device = next(model.parameters()).device
    found = {
        name: LayerRouting(
            wanted=torch.zeros(num_classes, layer.num_experts, dtype=torch.int64),
            kept=torch.zeros(num_classes, layer.num_experts, dtype=torch.int64),
            gates=torch.zeros(layer.num_selected_experts, bins, dtype=torch.int64),
            numbers=torch.zeros(layer.num_selected_experts + 1, dtype=torch.int64),
        )
        for name, layer in layers.items()
    }
    with eval_mode(model):
        for images, labels in progress(loader):
            if len(images) == 0:
                continue
            if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise ValueError(
                    f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
                )
            model(images.to(device))
            grid = patch_grid(model, images)
            for name, layer in layers.items():
                _add(found[name], layer, labels, grid)
    return found


def _add(routing: LayerRouting, layer: MoeMlp, labels: Tensor, grid: tuple[int, ...] | None) -> None:
    record = layer.record
    experts, slots, gates = record.experts.cpu().long(), record.slots.cpu(), record.gates.float().cpu()
    kept = slots >= 0
    num_experts = routing.kept.shape[1]
    # (T, K) cell of the class-by-expert table.
    cell = labels.cpu().repeat_interleave(len(slots) // len(labels)).unsqueeze(1) * num_experts + experts
    wanted = torch.ones_like(kept) if record.selected is None else record.selected.cpu()
    routing.wanted += torch.bincount(cell[wanted], minlength=routing.wanted.numel()).view_as(routing.wanted)
    routing.kept += torch.bincount(cell[kept], minlength=routing.kept.numel()).view_as(routing.kept)
    bins = routing.gates.shape[1]
    for rank, histogram in enumerate(routing.gates):
        histogram += gates[:, rank].histc(bins, 0.0, 1.0).long()
    routing.tokens += len(slots)
    routing.unprocessed += int((~kept).all(1).sum())
    routing.numbers += torch.bincount(kept.sum(1), minlength=len(routing.numbers))
    routing.slots += layer.record.num_slots(layer.num_experts)
    if grid is not None:
        _add_positions(routing, experts, kept, len(labels), grid)


def _add_positions(routing: LayerRouting, experts: Tensor, kept: Tensor, images: int, grid: tuple[int, ...]) -> None:
    *times, rows, columns = grid
    patches = math.prod(grid)
    num_experts = routing.kept.shape[1]
    if routing.positions is None:
        routing.positions = torch.zeros(rows, columns, num_experts, dtype=torch.int64)
    # Class and register tokens come first and have no place.
    experts, kept = (choices.view(images, -1, choices.shape[1])[:, -patches:] for choices in (experts, kept))
    # The same place at all times, which come first.
    cell = torch.arange(rows * columns).repeat(math.prod(times)).view(1, -1, 1) * num_experts + experts
    count = torch.bincount(cell[kept], minlength=routing.positions.numel())
    routing.positions += count.view_as(routing.positions)


@torch.no_grad()
def kept_choices_per_patch(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Counts for every patch how many of its choices an expert processed, at the routing that is set, in eval mode.

    Args:
        model: a VMoE.
        images: (B, C, H, W), or clips (B, C, T, H, W); consecutive ones form the routing groups.

    Returns:
        {layer name: (B, rows, columns) int64 in 0..K, on the CPU}, of clips (B, times, rows, columns): 0 where the
        layer passed the patch by. Class and register tokens, which take part in the routing, are left out.

    Raises:
        ValueError: if the model has no MoE layer, or one that has no choices per token.
    """
    layers = routed_layers(model)
    with eval_mode(model):
        model(images.to(next(model.parameters()).device))
    grid = patch_grid(model, images)
    maps = {}
    for name, layer in layers.items():
        kept = (layer.record.slots >= 0).sum(1).view(len(images), -1)
        maps[name] = kept[:, model.num_prefix_tokens :].reshape(len(images), *grid).cpu()
    return maps
