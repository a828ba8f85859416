"""Weights for a model that was parallelised on the meta device; no process ever holds the whole model."""

import hashlib

import torch
from torch import nn

from vmoe_torch.layers.int8_experts import refuse_int8
from vmoe_torch.parallel.checkpoint import part_of
from vmoe_torch.parallel.ranks.agreement import require_same


def materialize(model: nn.Module, seed: int, device: str | torch.device = "cpu") -> nn.Module:
    """Gives every rank its part of freshly initialised weights, in place; the same weights on any number of ranks.

    One module at a time is whole, on the CPU: the model initialises itself once per module, with every other parameter
    on the meta device, where nothing happens. So a rank needs its own part and the largest module.

    Args:
        model: with `init_weights()` (VMoE), parallelised on the meta device or not parallelised at all.
        seed: of the weights.
        device: where the parts go.

    Returns:
        The model.

    Raises:
        ValueError: if the model cannot initialise itself, has buffers of a module without `reset_parameters`, which
            nothing here would fill, or int8 experts, or ranks give different seeds.
    """
    if not hasattr(model, "init_weights"):
        raise ValueError(f"the model must have init_weights(), got {type(model).__name__}")
    unfilled = [module for module in model.modules() if not hasattr(module, "reset_parameters")]
    buffers = {id(buffer) for module in unfilled for buffer in module.buffers(recurse=False)}
    if names := [name for name, buffer in model.named_buffers() if id(buffer) in buffers]:
        raise ValueError(f"the model must have no buffers, got {', '.join(names)}")
    require_same({"seed": seed})
    # Before its weights are gone.
    refuse_int8(model, "to be initialised")
    model.to_empty(device=device)
    own = {name: (module, dict(module.named_parameters(recurse=False))) for name, module in model.named_modules()}
    try:
        for module, parameters in own.values():
            _replace(module, parameters, "meta")
        for name, (module, parameters) in own.items():
            if not parameters:
                continue
            _replace(module, parameters, "cpu")
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the generators of all devices.
                torch.default_generator.manual_seed(_seed_of(seed, name))
                model.init_weights()
            for key, parameter in parameters.items():
                _fill(parameter, module._parameters[key].detach())
            _replace(module, parameters, "meta")
    finally:
        for module, parameters in own.values():
            module._parameters.update(parameters)
    return model


def _replace(module: nn.Module, parameters: dict[str, nn.Parameter], device: str) -> None:
    """Puts whole, empty parameters into the module."""
    for key, parameter in parameters.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        # Past setattr, where FSDP would look for its own.
        module._parameters[key] = nn.Parameter(whole, requires_grad=parameter.requires_grad)


@torch.no_grad()
def _fill(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    # Every rank has drawn the same, so each takes its part of its own.
    parameter.copy_(part_of(whole, parameter))


def _seed_of(seed: int, name: str) -> int:
    """One seed per module, whatever the order of the modules."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
