"""The experts' linear layers: one weight per expert, initialised as the original does."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vmoe_torch.layers.quantised import plain

# Of both layers: (E, H, D), (E, H) or none, (E, O, H), (E, O) or none.
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class ExpertLinear(nn.Module):
    """One linear layer per expert: weight (E, out, in), bias (E, out) or none.

    A `MoeMlp` runs its experts as one op. It does so inside the calls of these layers, so that whatever acts on a
    module when it is called (hooks, adapters, pruning, offloading, sharding) acts in time on what the op reads.
    """

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

    def linears(self) -> list["ExpertLinear"]:
        """The layers of each size of experts: itself."""
        return [self]

    @torch.jit.ignore
    def forward(self, x: Tensor, use: Callable | None = None):
        """Every expert's linear layer, or another use of its parameters.

        Args:
            x: (E, R, in), rows of each expert, or (R, in), rows for all of them. With `use`, what that takes.
            use: called in place of the linear layer with x, the weight and the bias (None without one), while
                they are in place; `MoeMlp` passes the op that runs the experts.

        Returns:
            (E, R, out), or what `use` returns: inside a `MoeMlp`, the (T, out) tokens that the experts made together.

        Raises:
            ValueError: if x is neither of the shapes.
        """
        weight, bias = plain(self.weight), plain(self.bias)
        if use is not None:
            return use(x, weight, bias)
        num_experts, _, in_features = weight.shape
        if x.shape[-1:] != (in_features,) or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] != num_experts):
            raise ValueError(f"x must be (R, {in_features}) or ({num_experts}, R, {in_features}), got {tuple(x.shape)}")
        y = x @ weight.transpose(1, 2)
        return y if bias is None else y + bias.unsqueeze(1)

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


def parameters(_, *found: Tensor | None) -> tuple[Tensor | None, ...]:
    """What to give the experts' layers as their `use` where their parameters are wanted."""
    return found
