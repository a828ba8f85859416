"""The experts' linear layers: one weight per expert, initialised as the original does."""

import math

import torch
from torch import nn


class ExpertLinear(nn.Module):
    """One linear layer per expert: weight (E, out, in), bias (E, out) or none."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        shape = (num_experts, out_features)
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the original: Xavier uniform per expert, the same draw for every expert; biases normal(1e-6)."""
        bound = math.sqrt(6.0 / (self.weight.shape[1] + self.weight.shape[2]))
        self.init_shared(lambda weight: weight.uniform_(-bound, bound), lambda bias: bias.normal_(std=1e-6))

    @torch.no_grad()
    def init_shared(self, weight_init, bias_init) -> None:
        """Initialises the first expert and copies it to the others, as the original does (split_rngs=False)."""
        for parameter, init in ((self.weight, weight_init), (self.bias, bias_init)):
            if parameter is not None and parameter.shape[0] > 0:
                init(parameter[0])
                parameter[1:] = parameter[0]

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts}, {in_features}, {out_features}, bias={self.bias is not None}"
