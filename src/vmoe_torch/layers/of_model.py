"""The MoE layers of any model."""

from torch import nn

from vmoe_torch.layers.moe_mlp import MoeMlp


def moe_layers(model: nn.Module) -> dict[str, MoeMlp]:
    """The MoE layers of a model by their qualified name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoeMlp)}
