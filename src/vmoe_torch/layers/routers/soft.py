"""Soft MoE (arXiv 2308.00951): every slot of an expert is a mixture of all tokens of an image, and every token gets a
mixture of what all slots give. Nothing is chosen or dropped, and an image's result is its own.

Dims: D width, E experts, P slots per expert, G images of S tokens, T = G * S tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vmoe_kernels.common.checks import check_integer, check_number
from vmoe_kernels.common.flops import linear_flops
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.routers.base import Routed, Router
from vmoe_torch.layers.scores import lecun_normal_, logits

# What says nothing to a soft router, and how a layer has it where it is left out.
_LEFT_OUT = {
    "num_selected_experts": (2,),
    "eval_capacity_factor": (None,),
    "batch_priority": (True,),
    "priority": ("max",),
    "capacity_multiple_of": (4, 1, 0, None),
    "renormalize_gates": (False,),
    "router_z_loss_weight": (0.0,),
}
_CAPACITY_FACTOR = 1.05
_WHY = "a soft router mixes all tokens into every slot"


class Soft(Router):
    """Softmax over an image's tokens fills the slots; softmax over all slots makes a token of their outputs.

    The logits are those of unit vectors, tokens x / |x| and slots mu / |mu|, times a learnt `scale`.
    """

    ROUTING = ()
    NOTE = f" (capacity, K and priority do not apply: {_WHY})"
    NOISE_STD = 0.0
    takes_any_batch = True
    takes_sizes = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        slots_per_expert: int | None = None,
        capacity_factor: float = _CAPACITY_FACTOR,
        **options: Any,
    ):
        for name, values in _LEFT_OUT.items():
            if options[name] not in values:
                raise ValueError(f"{name} must be left out with router='soft', got {options[name]!r}: {_WHY}")
        slots = 0 if slots_per_expert is None else slots_per_expert
        slots = check_integer("slots_per_expert", slots, 0, "None or at least 0")
        capacity_factor = check_number("capacity_factor", capacity_factor, "above 0", math.ulp(0.0))
        if slots and capacity_factor != _CAPACITY_FACTOR:
            raise ValueError(
                f"capacity_factor must be left out with router='soft' and slots_per_expert={slots}, "
                f"got {capacity_factor}: slots_per_expert says how many slots there are"
            )
        super().__init__(dim, num_experts, device, dtype, slots_per_expert=slots or None, **options)
        self.capacity_factor = self.eval_capacity_factor = capacity_factor
        self.capacity_rounding, self.capacity_multiple_of = "round", 1

    def make_parameters(self, dim: int, slots_per_expert: int | None, **dd: Any) -> None:
        self.dim, self.slots_per_expert = dim, slots_per_expert
        if slots_per_expert is None:
            self.mu = nn.UninitializedParameter(**dd)
        else:
            self.mu = nn.Parameter(torch.empty(dim, self.num_experts, slots_per_expert, **dd))
        self.scale = nn.Parameter(torch.empty((), **dd))

    @torch.jit.unused
    def fit(self, group_tokens: int) -> None:
        """Makes the slots for images of so many tokens, where their number was left to the capacity factor."""
        if self.slots_per_expert is None:
            self._make_slots(self.slots_for(group_tokens, 1))

    @torch.jit.unused
    def _make_slots(self, slots_per_expert: int) -> None:
        self.slots_per_expert = slots_per_expert
        self.mu.materialize((self.dim, self.num_experts, slots_per_expert))
        self.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = state_dict.get(f"{prefix}mu")
        if self.slots_per_expert is None and given is not None and given.ndim == 3:
            self._make_slots(given.shape[2])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the original: `scale` is 1, and `mu` LeCun normal, as Flax has it of three dims: its fan-in is D * E."""
        nn.init.ones_(self.scale)
        if not is_lazy(self.mu):
            lecun_normal_(self.mu, fan_in=self.dim * self.num_experts)

    def capacity(self, group_tokens: int) -> int:
        """P, for a group of so many tokens; once there are slots, for any."""
        # A local one, for TorchScript.
        slots_per_expert = self.slots_per_expert
        if slots_per_expert is not None:
            return slots_per_expert
        return self.slots_for(group_tokens, 1)

    @torch.jit.unused
    def images(self, images: int, left_out: bool = False) -> int:
        """1: a group is an image."""
        if images != 1 and not left_out:
            raise ValueError(f"group_size must be 'image' with router='soft', got {images or 'batch'!r}")
        return 1

    @torch.jit.unused
    def set_routing(self) -> None:
        """Nothing may change: capacity, K and priority do not apply."""

    def __prepare_scriptable__(self):
        raise RuntimeError("a scripted MoeMlp must route by top_experts or threshold, got soft")

    @torch.jit.ignore
    def forward(self, x: Tensor, groups: Groups | None = None, seed: Tensor | None = None):
        """The logits of every slot or, with groups, how all tokens are mixed.

        Args:
            x: (..., D) tokens; (T, D) with groups.
            groups: images of S tokens each.
            seed: not used; noise is drawn from the device's generator.

        Returns:
            (..., E, P) without noise, in float32 (float64 for float64 inputs); with groups, `Routed`.

        Raises:
            ValueError: if the width of x is not D.
        """
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x must be (..., {self.dim}), got {tuple(x.shape)}")
        if groups is None:
            self.fit(x.shape[-2] if x.ndim > 1 else 1)
            return soft_logits(x, self.mu, self.scale).unflatten(-1, (self.num_experts, -1))
        self.fit(groups.size)
        mu, scale = self.mu, self.scale
        if self.exchange is not None:
            mu, scale = self.exchange.local(mu), self.exchange.local(scale)
        scores = soft_logits(x.view(-1, groups.size, self.dim), mu, scale)
        noisy = scores
        if self.training and self.noise_std > 0:
            noisy = scores + torch.randn_like(scores) * self.noise_std
        gates = noisy.softmax(2).flatten(0, 1)
        slots = torch.arange(gates.shape[1], dtype=torch.int32, device=x.device).expand_as(gates)
        return Routed(gates, slots, {"logits": scores.flatten(0, 1)}, mix=noisy.softmax(1))

    @torch.jit.unused
    def flops(self, tokens: int) -> int:
        # Logits, and the two mixtures.
        return 3 * linear_flops(tokens, (self.mu.shape[1] * self.mu.shape[2], self.dim))

    @torch.jit.unused
    def kept_numbers(self) -> int:
        # Unit vectors, the shares of the slots and those of the token.
        return self.dim + 2 * self.mu.shape[1] * self.mu.shape[2]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}"


def soft_logits(x: Tensor, mu: Tensor, scale: Tensor) -> Tensor:
    """Cosines of tokens and slots, times a scale.

    Args:
        x: (..., S, D) or (D,) tokens.
        mu: (D, E, P).
        scale: 0-dim.

    Returns:
        (..., S, E * P), never narrower than float32, also under autocast.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, slots = _unit(x.to(dtype), -1), _unit(mu.to(dtype).flatten(1), 0)
    # Into the smaller of the two, by one image's size: the batch changes no rounding.
    if x.ndim > 1 and x.shape[-2] >= slots.shape[1]:
        slots = slots * scale
    else:
        x = x * scale
    return logits(x, slots.t())


def _unit(x: Tensor, dim: int) -> Tensor:
    return x * (x.square().sum(dim, keepdim=True) + 1e-6).rsqrt()
