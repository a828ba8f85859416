"""Routing statistics over a data set, and which patches of an image the experts processed.

Dims: B images, L tokens per image (class and register tokens first), K choices per token, E experts, N classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmoe_torch.control import moe_layers
from vmoe_torch.evaluate.settings import eval_mode


@dataclass
class LayerRouting:
    """What one MoE layer did with every token of a data set.

    Attributes:
        wanted: (N, E) int64, choices that tokens of a class's images made, kept or not.
        kept: (N, E) int64, those that found a free slot.
        gates: (K, bins) int64, histogram over 0..1 of the gates of each choice rank.
        tokens: number of tokens.
        unprocessed: number of tokens whose choices were all dropped.
    """

    wanted: Tensor
    kept: Tensor
    gates: Tensor
    tokens: int = 0
    unprocessed: int = 0

    @property
    def load(self) -> Tensor:
        """(E,) share of the kept choices that each expert processed."""
        return self.kept.sum(0) / self.kept.sum().clamp(min=1)

    @property
    def dropped(self) -> float:
        """Share of all choices that were dropped."""
        return 1.0 - float(self.kept.sum() / self.wanted.sum().clamp(min=1))

    @property
    def expert_share(self) -> Tensor:
        """(N, E) share of a class's kept choices that went to each expert; 0 for a class without any."""
        return self.kept / self.kept.sum(1, keepdim=True).clamp(min=1)


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
        model: any module with top-experts MoE layers.
        loader: batches of images (B, C, H, W) and labels (B,) int64 below `num_classes`.
        num_classes: N.
        bins: of the gate histograms.
        progress: wraps the loader, e.g. `tqdm`.

    Returns:
        {layer name: LayerRouting, on the CPU}, in the order of the layers.

    Raises:
        ValueError: if the model has no MoE layer or one that has no choices per token to count.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    for name, layer in layers.items():
        if layer.router_type != "top_experts":
            raise ValueError(f"{name} must route by top_experts, got {layer.router_type}")
    device = next(model.parameters()).device
    found = {
        name: LayerRouting(
            wanted=torch.zeros(num_classes, layer.num_experts, dtype=torch.int64),
            kept=torch.zeros(num_classes, layer.num_experts, dtype=torch.int64),
            gates=torch.zeros(layer.num_selected_experts, bins, dtype=torch.int64),
        )
        for name, layer in layers.items()
    }
    with eval_mode(model):
        for images, labels in progress(loader):
            if len(images) == 0:
                continue
            model(images.to(device))
            for name, layer in layers.items():
                _add(found[name], layer.record, labels)
    return found


def _add(routing: LayerRouting, record, labels: Tensor) -> None:
    experts, slots, gates = record.experts.cpu().long(), record.slots.cpu(), record.gates.float().cpu()
    kept = slots >= 0
    num_experts = routing.kept.shape[1]
    # (T, K) cell of the class-by-expert table.
    cell = labels.cpu().repeat_interleave(len(slots) // len(labels)).unsqueeze(1) * num_experts + experts
    routing.wanted += torch.bincount(cell.flatten(), minlength=routing.wanted.numel()).view_as(routing.wanted)
    routing.kept += torch.bincount(cell[kept], minlength=routing.kept.numel()).view_as(routing.kept)
    bins = routing.gates.shape[1]
    for rank, histogram in enumerate(routing.gates):
        histogram += gates[:, rank].histc(bins, 0.0, 1.0).long()
    routing.tokens += len(slots)
    routing.unprocessed += int((~kept).all(1).sum())


@torch.no_grad()
def kept_choices_per_patch(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Counts for every patch how many of its choices an expert processed, at the routing that is set, in eval mode.

    Args:
        model: a VMoE.
        images: (B, C, H, W); consecutive images form the routing groups.

    Returns:
        {layer name: (B, rows, columns) int64 in 0..K, on the CPU}: 0 where the layer passed the patch by. Class and
        register tokens, which take part in the routing, are left out.

    Raises:
        ValueError: if the model has no MoE layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    with eval_mode(model):
        model(images.to(next(model.parameters()).device))
    height, width = model.patch_embed.grid_size
    maps = {}
    for name, layer in layers.items():
        kept = (layer.record.slots >= 0).sum(1).view(len(images), -1)
        maps[name] = kept[:, model.num_prefix_tokens :].reshape(len(images), height, width).cpu()
    return maps
