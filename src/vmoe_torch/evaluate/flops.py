"""FLOPs of a model per image, next to those of its dense counterpart."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vmoe_kernels.common.flops import mlp_flops
from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.settings import DROPLESS


@dataclass(frozen=True)
class Flops:
    """FLOPs per image of a forward in eval mode, a multiply-add counting as two.

    Experts are counted at full capacity, as in the paper: an empty slot costs as much as a used one. Without
    capacities ("dropless") they are counted at the choices of the tokens, K each or, as a capacity has it,
    `mean_selected_experts` of them where that is set: whatever the images, so that settings can be compared. What a
    threshold let through of these images is in `filled`.
    """

    total: float
    """FLOPs of the whole model."""
    dense: float
    """FLOPs of the same model with one MLP of the layer's `hidden_features` in place of each MoE layer."""
    layers: dict[str, float] = field(default_factory=dict, hash=False)
    """FLOPs of each MoE layer by name, its router and its shared expert included."""
    filled: float | None = None
    """FLOPs of the whole model if slots without a token cost nothing and experts are as wide as they are; None where
    that cannot be known, as on the meta device."""
    several_sizes: bool = False
    """Whether there are experts of several sizes, so that what is filled depends on who chooses which."""

    @property
    def relative(self) -> float:
        """Share of the dense counterpart's FLOPs."""
        return self.total / self.dense

    def times(self, factor: int) -> "Flops":
        """Those of several forwards, as of a video's views."""
        layers = {name: factor * flops for name, flops in self.layers.items()}
        filled = None if self.filled is None else factor * self.filled
        return Flops(factor * self.total, factor * self.dense, layers, filled, self.several_sizes)


@torch.no_grad()
def count_flops(model: nn.Module, images: Tensor) -> Flops:
    """Counts the matrix products of one forward, at the routing that is set.

    Args:
        model: any module with MoE layers that takes a batch of images.
        images: (B, C, H, W), B >= 1, on any device. Capacity is rounded per group of images, so B should be a whole
            number of groups.

    Returns:
        Flops per image.

    Raises:
        ValueError: if there is no image.
    """
    if len(images) == 0:
        raise ValueError(f"images must hold at least one image, got {tuple(images.shape)}")
    counter = FlopCounterMode(display=False)
    # The fused attention of the CPU has no FLOP formula; the plain one is made of matrix products.
    with eval_mode(model), sdpa_kernel(SDPBackend.MATH), counter:
        model(images.to(next(model.parameters()).device))
    per_module = counter.get_flop_counts()
    total = dense = counter.get_total_flops()
    filled: float | None = total
    layers = {}
    for name, layer in moe_layers(model).items():
        layers[name] = sum(per_module[f"{type(model).__name__}.{name}"].values())
        if layer.eval_capacity_factor == DROPLESS:
            tokens = layer.record.slots.shape[0]
            rows = layer.own_router().dropless_rows(tokens)
            # Plain PyTorch leaves room for every token at every expert, the op counts K choices of each token.
            plain = layer.own_router().implementation() == "reference"
            ran = layer.num_experts * tokens if plain else layer.record.slots.numel()
            more = layer.expert_flops(rows) - layer.expert_flops(ran)
            total, dense, layers[name] = total + more, dense + more, layers[name] + more
            filled = None if filled is None else filled + more
        else:
            rows = layer.record.num_slots(layer.num_experts)
        dense -= layers[name]
        (_, in_features), (out_features, _) = (fc.linears()[0].weight.shape[-2:] for fc in (layer.fc1, layer.fc2))
        mlp = (layer.hidden_features, in_features), (out_features, layer.hidden_features)
        dense += mlp_flops(layer.record.slots.shape[0], *mlp)
        if filled is None or not layer.record.has_values():
            filled = None
        else:
            filled += layer.filled_flops() - layer.expert_flops(rows)
    per_layer = {name: count / len(images) for name, count in layers.items()}
    filled = None if filled is None else filled / len(images)
    several_sizes = any(len(layer.sizes.groups) > 1 for layer in moe_layers(model).values())
    return Flops(total / len(images), dense / len(images), per_layer, filled, several_sizes)


def ptflops_hooks() -> dict[type | object, Callable]:
    """What ptflops needs to count MoE layers, with either of its backends.

    Returns:
        `custom_modules_hooks` of `ptflops.get_model_complexity_info`: multiply-adds, experts at full capacity.
    """
    ops = (torch.ops.vmoe.router, torch.ops.vmoe.moe_mlp, torch.ops.vmoe.expert_mlp)
    return {MoeMlp: _count_layer, **{op: lambda inputs, _, op=op: flop_registry[op](*inputs) // 2 for op in ops}}


def _count_layer(layer: MoeMlp, inputs: tuple[Tensor], _: Tensor) -> None:
    """ptflops' hook on a module, which adds to an attribute that ptflops has made."""
    sizes = inputs[0].shape[:-1]
    tokens = sizes.numel()
    layer.__flops__ += layer.flops(tokens, layer.num_rows(tokens, sizes[1:].numel())) // 2
