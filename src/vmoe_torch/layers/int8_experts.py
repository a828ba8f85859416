"""Experts with int8 weights, for inference: each output channel of each expert in 255 steps of its own size.

Experts are most of a V-MoE's parameters, so this makes a model's file and memory some three times smaller than in
float32. Routers, biases, attention and the shared expert stay as they are: which experts a token meets in the first MoE
layer does not depend on rounded weights.

Dims: E experts, O and I widths out of and into a layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vmoe_torch.layers.experts import ExpertLinear

# Steps on either side of 0; -128 is left out, so that the grid is symmetric.
STEPS = 127


@torch.no_grad()
def quantize_experts(model: nn.Module) -> nn.Module:
    """Makes the weights of all experts int8, in place, for inference.

    A weight is rounded to the nearest multiple of its row's scale (half to even), the largest of the row over 127: no
    weight moves by more than half a scale, but for the rounding of the products. Each forward turns the weights of one
    MoE layer at a time back to the dtype that the scales have, that of the model.

    The weights are no parameters any more but buffers, `fc1.weight` int8 (E, out, in) and `fc1.weight_scale` (E, out):
    optimisers do not see them, training leaves the experts as they are but for their biases, and gradients reach the
    routers as before. So it comes last, after training, upcycling, pruning, averaging and parallel training. State
    dicts and files have the buffers, and `load_state_dict` of such makes a new model int8; floating-point weights are
    not loaded into a model that is.

    Args:
        model: any with MoE layers. Experts that are int8 already stay as they are.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no experts, or their weights are not finite floating-point parameters of their own
            (quantised already by another library, with adapters that are not merged, or parallelised); then nothing has
            changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
    if not layers:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    layers = {name: layer for name, layer in layers.items() if layer.weight_scale is None}
    for name, layer in layers.items():
        if not layer.is_plain():
            raise ValueError(
                "experts must have plain floating-point parameters to become int8 (adapters merged, masks removed, not "
                f"parallelised), got {type(layer.weight).__name__} of {layer.weight.dtype} in {type(layer).__name__} "
                f"{name}"
            )
        if not layer.weight.is_meta and not layer.weight.isfinite().all():
            raise ValueError(f"experts' weights must be finite to become int8, got NaN or infinity in {name}")
    for layer in layers.values():
        layer.become_int8(*_rounded(layer.weight))
    return model


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E, O, I) as int8 numbers of steps, and (E, O) steps."""
    steps = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(weight.shape[:2])
    kinds = torch.finfo(weight.dtype)
    # One expert at a time: all of them in float64 need not fit.
    for expert, own in enumerate(weight):
        largest = own.abs().amax(1)
        step = largest / STEPS
        # Steps next to 0 are few: one that was rounded down may be too short for the largest weight.
        short = step.double() * (STEPS + 0.5) < largest.double()
        step = torch.where(short, step + kinds.smallest_normal * kinds.eps, step)
        scale[expert] = torch.where(step > 0, step, 1)
        steps[expert] = (own.double() / scale[expert].double().unsqueeze(1)).round()
    return steps, scale


def int8_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """The layers with int8 weights, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExpertLinear) and module.weight_scale is not None
    }


def refuse_int8(model: nn.Module, purpose: str) -> None:
    """Raises ValueError if experts of a model are int8.

    Args:
        model: any.
        purpose: what they must not be, as "to be pruned".
    """
    if found := int8_layers(model):
        raise ValueError(
            f"experts must be of floating point {purpose}, got int8 ones in {next(iter(found))}: do it with the "
            "weights that they were made of, and quantize_experts afterwards"
        )


def weight_count(model: nn.Module) -> int:
    """Parameters of a model, and the int8 weights that once were such."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters + sum(layer.weight.numel() for layer in int8_layers(model).values())


def as_loaded(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict with the scales that it will have when it has loaded another one, where that is int8."""
    scales = {
        f"{name}_scale": value.new_empty(value.shape[:2])
        for name, value in own.items()
        if name.endswith(".weight") and value.dim() == 3 and name in state and state[name].dtype == torch.int8
    }
    return {**scales, **own}
