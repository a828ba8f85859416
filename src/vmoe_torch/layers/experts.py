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

    `weight_scale` is None. Where the weight is int8 (`vmoe_torch.quantize_experts`), both are buffers, and the scale is
    (E, out), of the dtype that the layer computes in. A state dict with an int8 weight makes the layer one of int8;
    floating-point weights are not loaded into that again.

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
        self.register_buffer("weight_scale", None)
        self.reset_parameters()

    def linears(self) -> list["ExpertLinear"]:
        """The layers of each size of experts: itself."""
        return [self]

    def floating_weight(self) -> Tensor:
        """The weight to compute with: times its scale where it is int8, else as it is."""
        scale = self.weight_scale
        # In place, of a copy: fresh memory costs a CPU more than the product.
        return self.weight if scale is None else self.weight.to(scale.dtype, copy=True).mul_(scale.unsqueeze(-1))

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
        weight, bias = plain(self.floating_weight()), plain(self.bias)
        if use is not None:
            return use(x, weight, bias)
        num_experts, _, in_features = weight.shape
        if x.shape[-1:] != (in_features,) or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] != num_experts):
            raise ValueError(f"x must be (R, {in_features}) or ({num_experts}, R, {in_features}), got {tuple(x.shape)}")
        y = x @ weight.transpose(1, 2)
        return y if bias is None else y + bias.unsqueeze(1)

    @torch.jit.unused
    def is_plain(self) -> bool:
        """Whether the weight is a floating-point parameter as the layer made it: no adapter's, mask's or mesh's."""
        weight = self._parameters.get("weight")
        return type(weight) is nn.Parameter and weight.is_floating_point()

    @torch.jit.unused
    def become_int8(self, weight: Tensor, scale: Tensor) -> None:
        """Replaces a plain weight.

        Args:
            weight: (E, out, in) int8.
            scale: (E, out), its steps.
        """
        del self.weight
        self.register_buffer("weight", weight)
        self.weight_scale = scale

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        weight, scale = (state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_scale"))
        if weight is not None and (weight.dtype == torch.int8) != (scale is not None):
            got = f"{weight.dtype} {'without' if scale is None else 'with'}"
            error_msgs.append(f"{prefix}weight must be int8 exactly where there is a weight_scale, got {got} one")
            return
        if scale is None and weight is not None and self.weight_scale is not None:
            error_msgs.append(
                f"{prefix}weight must be int8, as in this model since quantize_experts, got {weight.dtype}: load it "
                "into a new model, and quantise that"
            )
            return
        if scale is not None and weight is not None and self.weight_scale is None:
            if not self.is_plain():
                error_msgs.append(f"{prefix}weight must be a plain parameter for int8 weights to replace it")
                return
            own = self.weight
            # Of other shapes, the base class says which; the weight stays.
            if weight.shape == own.shape and scale.shape == own.shape[:2]:
                self.become_int8(torch.empty_like(own, dtype=torch.int8), own.new_empty(own.shape[:2]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the original: Xavier uniform per expert, the same draw for every expert; biases normal(1e-6)."""
        bound = math.sqrt(6.0 / (self.weight.shape[1] + self.weight.shape[2]))
        self.init_shared(lambda weight: weight.uniform_(-bound, bound), lambda bias: bias.normal_(std=1e-6))

    @torch.no_grad()
    def init_shared(self, weight_init, bias_init) -> None:
        """Initialises the first expert and copies it to the others, as the original does (split_rngs=False)."""
        if self.weight_scale is not None:
            raise ValueError("experts must be of floating point to be initialised, got int8 ones of quantize_experts")
        for parameter, init in ((self.weight, weight_init), (self.bias, bias_init)):
            if parameter is not None and parameter.shape[0] > 0:
                init(parameter[0])
                parameter[1:] = parameter[0]

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        int8 = "" if self.weight_scale is None else ", int8"
        return f"{num_experts}, {in_features}, {out_features}, bias={self.bias is not None}{int8}"


def parameters(_, *found: Tensor | None) -> tuple[Tensor | None, ...]:
    """What to give the experts' layers as their `use` where their parameters are wanted."""
    return found
