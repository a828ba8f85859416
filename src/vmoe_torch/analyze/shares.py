"""What routers do whose tokens choose nothing: how many experts take a token, and of what tokens slots are mixtures.

Counts and sums only, so memory does not grow with the images.

Dims: B images, T tokens, E experts, N slots of an image, h x w patches; before these, of clips, t layers in time.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vmoe_torch.analyze.statistics import patch_grid
from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.layers import MoeMlp, Routed

# Words of `router` whose tokens choose nothing.
WITHOUT_CHOICES = ("expert_choice", "soft")


@dataclass
class ExpertsPerToken:
    """How many experts took each token of a data set, in a layer of expert choice."""

    counts: Tensor
    """(E + 1,) int64, tokens by the number of experts that took them."""

    @property
    def lowest(self) -> int:
        """The fewest experts that any token had."""
        return int(self.counts.nonzero().min())

    @property
    def highest(self) -> int:
        """The most experts that any token had."""
        return int(self.counts.nonzero().max())

    @property
    def mean(self) -> float:
        """Experts of a token on average: the capacity factor after its rounding."""
        return int((self.counts * torch.arange(len(self.counts))).sum()) / int(self.counts.sum())

    def at_least(self, experts: int) -> float:
        """Share of the tokens that so many experts took, or more."""
        return int(self.counts[experts:].sum()) / int(self.counts.sum())


@dataclass
class Spread:
    """Smallest, mean and largest of many numbers."""

    count: int = 0
    """How many there were."""
    total: float = 0.0
    """Their sum."""
    lowest: float = math.inf
    """The smallest."""
    highest: float = -math.inf
    """The largest."""

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / max(self.count, 1)

    def add(self, values: Tensor) -> None:
        """Takes in more of them."""
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, float(values.max()))


@dataclass
class Mixtures:
    """How a soft layer mixed the tokens of a data set, in effective numbers: of k equal shares, k."""

    tokens_of_a_slot: Spread = field(default_factory=Spread)
    """Of how many tokens a slot is a mixture."""
    slots_of_a_token: Spread = field(default_factory=Spread)
    """Of how many slots' outputs a token is a mixture."""


def effective_number(shares: Tensor, dim: int) -> Tensor:
    """The exponential of the entropy: k for k equal shares, 1 for a single one.

    Args:
        shares: at least 0, with the sum 1 along `dim`.
        dim: to sum over.
    """
    return torch.special.entr(shares).sum(dim).exp()


@contextmanager
def routed_values(layers: dict[str, MoeMlp]) -> Iterator[dict[str, Routed]]:
    """What the layers' routers gave in their last forward, by name, while the block lasts."""
    found: dict[str, Routed] = {}
    handles = [
        layer.own_router().register_forward_hook(lambda _router, _inputs, out, name=name: found.update({name: out}))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers_without_choices(model: nn.Module) -> dict[str, MoeMlp]:
    """The MoE layers whose tokens choose nothing; empty for a model without them."""
    return {name: layer for name, layer in moe_layers(model).items() if layer.router_type in WITHOUT_CHOICES}


@torch.no_grad()
def collect_shares(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, ExpertsPerToken | Mixtures]:
    """Collects what every layer without choices does over a data set, in eval mode.

    Args:
        model: any module with such layers; others are left out.
        loader: batches of images (B, C, H, W), or clips (B, C, T, H, W), and labels, at least one image.
        progress: wraps the loader, e.g. `tqdm`.

    Returns:
        {layer name: `ExpertsPerToken` of expert choice, `Mixtures` of a soft layer}.

    Raises:
        ValueError: if the model has no such layer.
    """
    layers = layers_without_choices(model)
    if not layers:
        raise ValueError(f"model must have a layer that routes by {' or '.join(WITHOUT_CHOICES)}, got none")
    device = next(model.parameters()).device
    found: dict[str, ExpertsPerToken | Mixtures] = {
        name: Mixtures()
        if layer.router_type == "soft"
        else ExpertsPerToken(torch.zeros(layer.num_experts + 1, dtype=torch.int64))
        for name, layer in layers.items()
    }
    with eval_mode(model), routed_values(layers) as values:
        for images, _ in progress(loader):
            if len(images) == 0:
                continue
            model(images.to(device))
            for name, collected in found.items():
                if isinstance(collected, Mixtures):
                    collected.tokens_of_a_slot.add(effective_number(values[name].mix, 1))
                    collected.slots_of_a_token.add(effective_number(values[name].gates, 1))
                else:
                    taken = (values[name].slots >= 0).sum(1)
                    collected.counts += torch.bincount(taken, minlength=len(collected.counts)).cpu()
    return found


@torch.no_grad()
def shares_of_patches(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the layers without choices do with every patch, in eval mode.

    Args:
        model: a VMoE.
        images: (B, C, H, W), or clips (B, C, T, H, W).

    Returns:
        {layer name: (B, h, w) int64 experts that took each patch, of expert choice; (B, N, h, w) float32 share of each
        patch in every slot, of a soft layer}, on the CPU; of clips (B, t, h, w) and (B, N, t, h, w). Class and register
        tokens are left out.
    """
    layers = layers_without_choices(model)
    with eval_mode(model), routed_values(layers) as values:
        model(images.to(next(model.parameters()).device))
    grid = patch_grid(model, images)
    patches = math.prod(grid)
    maps = {}
    for name, routed in values.items():
        if routed.mix is None:
            taken = (routed.slots >= 0).sum(1).view(len(images), -1)
            maps[name] = taken[:, -patches:].reshape(len(images), *grid).cpu()
        else:
            shares = routed.mix[:, -patches:].transpose(1, 2).float()
            maps[name] = shares.reshape(*shares.shape[:2], *grid).cpu()
    return maps
