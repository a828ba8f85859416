"""How much every expert of a model is used on some images."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.usage import ExpertUsage


@torch.no_grad()
def expert_usage(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, ExpertUsage]:
    """Runs a model in eval mode, routed as it is set now, and counts what each expert processed.

    Args:
        model: any with MoE layers.
        batches: of images, as the model takes them, on any device.

    Returns:
        {layer name: usage}, on the CPU.

    Raises:
        ValueError: if the model has no MoE layer, or there is no batch.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"model must have at least one MoE layer, got {type(model).__name__} without any")
    device = next(model.parameters()).device
    found: dict[str, ExpertUsage] = {}
    with eval_mode(model):
        for images in batches:
            model(images.to(device))
            for name, layer in layers.items():
                found[name] = _added(found.get(name), _used(layer))
    if not found:
        raise ValueError("batches must hold at least one, got none")
    return found


def _used(layer: MoeMlp) -> ExpertUsage:
    """Of the last forward."""
    record = layer.record
    if record.slots is None or record.groups is None:
        raise ValueError("every MoE layer must have run in a forward, got one that has not")
    if layer.own_router().slots_per_expert is not None:
        raise ValueError(f"every MoE layer must have choices to count, got one of router {layer.router_type!r}")
    kept, experts = record.slots >= 0, record.kept_experts()
    choices = torch.bincount(experts, minlength=layer.num_experts)
    gates = torch.zeros(layer.num_experts, dtype=torch.float64, device=kept.device)
    gates = gates.index_add(0, experts, record.gates[kept].double())
    return ExpertUsage(choices.cpu(), gates.cpu(), len(kept))


def _added(before: ExpertUsage | None, more: ExpertUsage) -> ExpertUsage:
    return more if before is None else ExpertUsage(*(old + new for old, new in zip(before, more)))
