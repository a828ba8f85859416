"""The way back to a dense model: the experts of each layer averaged into one MLP (arXiv 2308.06093).

An option to measure, not a claim: the paper averages experts that were trained for it, with tokens spread over them at
random; those of a V-MoE have parted, and their average computes something else.
"""

import copy
from collections.abc import Mapping

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vmoe_kernels.common.checks import check_flag
from vmoe_torch.layers import ExpertLinear, MoeMlp
from vmoe_torch.layers.shared import ACTIVATIONS
from vmoe_torch.layers.usage import ExpertUsage
from vmoe_torch.models.pruning import check_experts, counts_of, layers_of, remember_arguments


@torch.no_grad()
def to_dense(
    model: nn.Module,
    *,
    usage: Mapping[str, ExpertUsage | Tensor] | None = None,
    scale_gates: bool = False,
) -> nn.Module:
    """A copy of a model with one timm `Mlp` in place of each `MoeMlp`: the average of the layer's experts.

    The router is gone, and with it groups, capacity and gates. Experts that are all equal, as `upcycle` makes them,
    give that MLP back bit for bit (in float32 and narrower).

    Args:
        model: any with MoE layers whose experts are of one size, whatever their router; not changed.
        usage: choices that each expert processed, by layer, to weigh the experts by: of
            `vmoe_torch.evaluate.expert_usage`, or (E,) numbers. None weighs all alike.
        scale_gates: whether the MLP's output is multiplied by the mean of a token's summed gates, as the output of the
            experts was; needs the usage that `expert_usage` counts.

    Returns:
        The copy, in the same mode, dtype and on the same device; a `VMoE` becomes one without MoE layers, with the
        names of weights that timm's VisionTransformer has.

    Raises:
        ValueError: if there is no MoE layer, an argument is off, or a layer is of a kind that has no average.
    """
    scale_gates = check_flag("scale_gates", scale_gates)
    layers = averaged_layers(model)
    averages = {name: _average(layer, *_weighed(name, layer, usage, scale_gates)) for name, layer in layers.items()}
    # Not the experts, of which there are many: the copies of their layers are the averages.
    model = copy.deepcopy(model, {id(layer): averages[name] for name, layer in layers.items()})
    remember_arguments(model)
    return model


def averaged_layers(model: nn.Module) -> dict[str, MoeMlp]:
    """The MoE layers of a model by name, which all have an average.

    Raises:
        ValueError: if there is none, or one has no average.
    """
    layers = layers_of(model)
    if "" in layers:
        raise ValueError("model must have its MoE layers inside, got a MoeMlp itself")
    for name, layer in layers.items():
        check_experts(name, layer)
        if layer.shared_expert is not None:
            raise ValueError(
                "shared_expert_hidden must be None for experts to become one MLP, got "
                f"{layer.shared_expert.fc1.out_features} units in {name}"
            )
    return layers


def _weighed(
    name: str, layer: MoeMlp, usage: Mapping[str, ExpertUsage | Tensor] | None, scale_gates: bool
) -> tuple[Tensor, float]:
    """(E,) float64 weights of the experts, not normalised, and what the output is multiplied by."""
    weights = torch.ones(layer.num_experts, dtype=torch.float64) if usage is None else counts_of(name, layer, usage)
    if weights.sum() == 0:
        raise ValueError(f"usage must be above 0 for at least one expert of {name}, got none")
    if not scale_gates:
        return weights, 1.0
    found = None if usage is None else usage[name]
    if not isinstance(found, ExpertUsage) or found.tokens < 1:
        raise ValueError(f"usage must be of expert_usage to scale by gates, got {type(found).__name__} for {name}")
    return weights, float(found.gates.sum()) / found.tokens


def _average(layer: MoeMlp, weights: Tensor, scale: float) -> Mlp:
    """The MLP of a layer, in its mode."""
    weight = layer.fc1.weight
    mlp = Mlp(
        weight.shape[2],
        weight.shape[1],
        layer.fc2.weight.shape[1],
        act_layer=ACTIVATIONS[layer.activation],
        bias=layer.fc1.bias is not None,
        drop=(layer.expert_drop, layer.drop.p),
        device=weight.device,
        dtype=weight.dtype,
    )
    for experts, dense, factor in ((layer.fc1, mlp.fc1, 1.0), (layer.fc2, mlp.fc2, scale)):
        _copy_average(experts, dense, weights.to(weight.device), factor)
    return mlp.train(layer.training)


def _copy_average(experts: ExpertLinear, dense: nn.Linear, weights: Tensor, factor: float) -> None:
    for key, parameter in dense.named_parameters():
        total = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        # One expert at a time: all of them in float64 need not fit.
        for weight, expert in zip(weights, getattr(experts, key)):
            total += weight * expert.double()
        parameter.copy_(total / weights.sum() * factor)
        parameter.requires_grad_(getattr(experts, key).requires_grad)
