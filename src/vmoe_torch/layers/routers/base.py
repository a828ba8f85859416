"""What every router is: a module whose forward takes tokens and groups and says where each token goes.

A router decides: noise, choice, losses, capacity and the settings that concern them are its own. `MoeMlp` groups the
tokens and runs the experts. A new router is a file beside this one, with a subclass of `Router` that has a `route` of
its own, and a line in `routers/__init__.py`.

Dims: T tokens, D width, E experts, K choices of a token, R rows per expert.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmoe_kernels import compute_capacity
from vmoe_kernels.common.checks import check_flag, check_integer, check_number, check_selected
from vmoe_kernels.common.flops import linear_flops
from vmoe_torch.layers.auxiliary import inject_auxiliary_loss
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.losses import router_z_loss
from vmoe_torch.layers.options import CapacityFactor
from vmoe_torch.layers.quantised import plain
from vmoe_torch.layers.recording import is_recorded
from vmoe_torch.layers.scores import lecun_normal_, logits
from vmoe_torch.layers.settings import DROPLESS, check_capacity_factor, one_of
from vmoe_torch.layers.sizes import ExpertSizes

AUXILIARY_MODES = ("injected", "manual")


class Routed(NamedTuple):
    """Where every token goes, and with what weight."""

    gates: Tensor
    """(T, K) weights of the sum that a token gets back."""
    slots: Tensor
    """(T, K) int32 row of each choice in the (E * R, D) buffer, or -1 where dropped."""
    record: dict[str, Tensor]
    """What a `Record` remembers, by its names, and what else a hook may want; "loss", 0-dim, is an auxiliary loss."""
    spans: Tensor | None = None
    """(2, E) int32 rows of each expert where slots are dropless, as `vmoe_kernels.assign_dropless_slots` gives them."""
    mix: Tensor | None = None
    """(G, S, K) of a router without choices: the share that every slot of a group takes of each of its tokens. Then
    the K slots of a group are those of its experts, one expert after another, and `slots` numbers them."""
    inverse: tuple[Tensor, Tensor] | None = None
    """The slots again, and the choice (E * R,) int32 that each of their rows holds, or -1, where that is known."""

    @property
    def choices(self) -> Tensor | None:
        """(E * R,) int32 choice of each row, where known; not of slots that a hook put in place of the router's."""
        return None if self.inverse is None or self.inverse[0] is not self.slots else self.inverse[1]

    @property
    def logits(self) -> Tensor:
        """(T, E) without noise."""
        return self.record["logits"]


class Router(nn.Module):
    """The (E, D) weight that scores every token against every expert, and all settings of routing; no bias.

    Args:
        dim: D.
        num_experts: E.
        device: of the weight.
        dtype: of the weight.
        expert_hidden: hidden width of every expert; None is of one width.
        **options: of `vmoe_torch.layers.options.MoeOptions`, all that concern routing.
    """

    # What may change after training, as `set_routing` takes it.
    ROUTING: tuple[str, ...] = (
        "num_selected_experts",
        "capacity_factor",
        "eval_capacity_factor",
        "batch_priority",
        "priority",
    )
    # Said where what is not in `ROUTING` is to be set.
    NOTE = ""
    # The noise where none is given.
    NOISE_STD = 1.0
    # P of a router that has slots of its own, once it is known.
    slots_per_expert: int | None = None
    # Whether a record of it may leave the number of tokens open.
    takes_any_batch = False
    # Whether it can do without capacities. It then gives slots and spans where `has_spans` says so; where not, its
    # groups have room for every token at every expert.
    takes_dropless = False
    # Whether its experts may be of several sizes.
    takes_sizes = True
    # Of the routers that have a threshold for gates; None is none.
    mean_selected_experts: float | tuple[float, ...] | None = None
    gate_threshold: float | None = None
    # The largest of mean_selected_experts.
    capacity_mean: float | None = None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        capacity_rounding: str,
        capacity_multiple_of: int | None,
        noise_std: float | None,
        importance_loss_weight: float,
        load_loss_weight: float,
        gshard_loss_weight: float,
        auxiliary_mode: str,
        renormalize_gates: bool,
        impl: str,
        slots_per_expert: int | None = None,
        size_loss_weight: float = 0.0,
        router_z_loss_weight: float = 0.0,
        expert_hidden: Sequence[int] | None = None,
        **routing: Any,
    ):
        super().__init__()
        self.num_experts = check_integer("num_experts", num_experts, 1)
        one_of("capacity_rounding", capacity_rounding, ("ceil", "round"))
        one_of("auxiliary_mode", auxiliary_mode, AUXILIARY_MODES)
        one_of("impl", impl, ("auto", "triton", "reference"))
        multiple_of = 0 if capacity_multiple_of is None else capacity_multiple_of
        self.capacity_multiple_of = check_integer("capacity_multiple_of", multiple_of, 0)
        self.capacity_rounding = capacity_rounding
        noise_std = self.NOISE_STD if noise_std is None else noise_std
        self.noise_std = check_number("noise_std", noise_std, "at least 0", 0.0)
        self.importance_loss_weight = check_number("importance_loss_weight", importance_loss_weight, "at least 0", 0.0)
        self.load_loss_weight = check_number("load_loss_weight", load_loss_weight, "at least 0", 0.0)
        self.gshard_loss_weight = check_number("gshard_loss_weight", gshard_loss_weight, "at least 0", 0.0)
        self.size_loss_weight = check_number("size_loss_weight", size_loss_weight, "at least 0", 0.0)
        self.router_z_loss_weight = check_number("router_z_loss_weight", router_z_loss_weight, "at least 0", 0.0)
        self.sizes = ExpertSizes(expert_hidden or (1,) * self.num_experts)
        if len(self.sizes.groups) > 1 and not self.takes_sizes:
            raise ValueError(f"expert_hidden must be one width for {type(self).__name__}, got {expert_hidden}")
        if len(self.sizes.groups) > 1 and self.gshard_loss_weight > 0:
            raise ValueError(
                "gshard_loss_weight must be 0 for experts of several sizes, which it would balance, "
                f"got {self.gshard_loss_weight}"
            )
        self.auxiliary_mode = auxiliary_mode
        self.renormalize_gates = check_flag("renormalize_gates", renormalize_gates)
        self.impl = impl
        for name in ("mean_selected_experts", "gate_threshold"):
            if name not in self.ROUTING and routing.get(name) is not None:
                raise ValueError(f"{name} must be None for the router {type(self).__name__}, got {routing[name]}")
        self.set_routing(**{name: routing[name] for name in self.ROUTING})
        # Installed from outside, as in `MoeMlp`: gives this rank's part of a weight.
        self.exchange = None
        self.make_parameters(dim, slots_per_expert, device=device, dtype=dtype)
        self.reset_parameters()

    def make_parameters(self, dim: int, slots_per_expert: int | None, **dd: Any) -> None:
        """Makes what is learnt, for D wide tokens, and refuses slots that the router has no use for."""
        if slots_per_expert is not None:
            raise ValueError(f"slots_per_expert must be None unless router is 'soft', got {slots_per_expert!r}")
        self.weight = nn.Parameter(torch.empty(self.num_experts, dim, **dd))

    def fit(self, group_tokens: int) -> None:
        """Makes what depends on the number of tokens of a group, and was left open; once and for all."""

    def images(self, images: int, left_out: bool = False) -> int:
        """Images per group where so many are asked for (0 is the whole batch), or where the choice was left out."""
        return images

    def infer(self, tokens: Tensor, groups: Groups) -> Routed:
        """The routing of a scripted layer."""
        return self.route(tokens, self.weight, groups, None)

    @torch.jit.unused
    def flops(self, tokens: int) -> int:
        """Of the logits of so many tokens, and of whatever beside the experts grows with the number of experts."""
        return linear_flops(tokens, self.weight.shape)

    @torch.jit.unused
    def kept_numbers(self) -> int:
        """Numbers of 4 bytes that a training forward keeps of each token's routing."""
        # Logits; gates, experts and slots.
        return self.num_experts + 3 * self.num_selected_experts

    @torch.jit.ignore
    def forward(self, x: Tensor, groups: Groups | None = None, seed: Tensor | None = None):
        """The logits of every expert or, with groups, the routing.

        Args:
            x: (..., D) tokens; (T, D) with groups.
            groups: of the tokens.
            seed: 0-dim int64 key of this forward's random numbers; needed with noise.

        Returns:
            (..., E) without noise, in float32 (float64 for float64 inputs); with groups, `Routed`.

        Raises:
            ValueError: if the width of x is not D.
        """
        weight = plain(self.weight)
        if groups is None:
            if x.shape[-1:] != weight.shape[1:]:
                raise ValueError(f"x must be (..., {weight.shape[1]}), got {tuple(x.shape)}")
            return logits(x, weight)
        if self.exchange is not None:
            weight = self.exchange.local(weight)
        routed = self.route(x, weight, groups, seed)
        loss = routed.record.get("loss")
        if self.training and self.router_z_loss_weight > 0 and x.shape[0] > 0:
            z_loss = self.router_z_loss_weight * router_z_loss(routed.logits)
            loss = routed.record["loss"] = z_loss if loss is None else loss + z_loss
        if loss is not None and self.auxiliary_mode == "injected":
            routed.record["loss"] = loss.detach()
            if loss.requires_grad:
                routed = routed._replace(gates=inject_auxiliary_loss(routed.gates, loss, weight))
        return routed

    def route(self, tokens: Tensor, weight: Tensor, groups: Groups, seed: Tensor | None) -> Routed:
        """Decides; TorchScript compiles it.

        Args:
            tokens: (T, D).
            weight: (E, D), the parameter or what stands for it.
            groups: of the tokens.
            seed: as in `forward`.
        """
        raise NotImplementedError

    def capacity(self, group_tokens: int) -> int:
        """C for a group of so many tokens, in the current mode."""
        return self.slots_for(group_tokens, 1)

    def slots_for(self, group_tokens: int, selected: int, mean: float | None = None) -> int:
        """C for a group of so many tokens with so many choices each, or on average, in the current mode."""
        factor = self.eval_capacity_factor
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.training:
                factor = self.capacity_factor
        if isinstance(factor, str):
            return group_tokens
        return compute_capacity(
            group_tokens,
            self.num_experts,
            factor,
            num_selected_experts=selected,
            rounding=self.capacity_rounding,
            multiple_of=self.capacity_multiple_of,
            mean_selected_experts=mean,
        )

    @torch.jit.unused
    def is_dropless(self) -> bool:
        """Whether every choice is processed, in the current mode."""
        return (self.capacity_factor if self.training else self.eval_capacity_factor) == DROPLESS

    @torch.jit.unused
    def dropless_rows(self, tokens: int) -> int:
        """Rows of so many tokens without capacities: K each, or as many as their mean stands for."""
        return round(tokens * (self.capacity_mean or self.num_selected_experts))

    @torch.jit.unused
    def has_spans(self) -> bool:
        """Whether this forward's slots are dropless ones; what is recorded for others knows nothing but capacities."""
        return self.is_dropless() and not (is_recorded() or torch.compiler.is_exporting())

    @torch.jit.unused
    def routing(self) -> dict[str, Any]:
        """What is set of `ROUTING`, as `set_routing` takes it."""
        return {name: getattr(self, name) for name in self.ROUTING}

    @torch.jit.unused
    def set_routing(
        self,
        *,
        num_selected_experts: int,
        capacity_factor: CapacityFactor,
        eval_capacity_factor: CapacityFactor | None,
        batch_priority: bool,
        priority: str,
    ) -> None:
        """Checks and sets everything in `ROUTING`; on an error nothing changes."""
        num_selected_experts = check_selected(num_selected_experts, self.num_experts)
        batch_priority = check_flag("batch_priority", batch_priority)
        one_of("priority", priority, ("max", "sum"))
        self.set_capacity(capacity_factor, eval_capacity_factor)
        self.num_selected_experts = num_selected_experts
        self.batch_priority = batch_priority
        self.priority = priority

    @torch.jit.unused
    def set_capacity(self, capacity_factor: CapacityFactor, eval_capacity_factor: CapacityFactor | None) -> None:
        """Checks and sets both factors; on an error nothing changes. None for eval mode is that of training."""
        if eval_capacity_factor is None:
            eval_capacity_factor = capacity_factor
        capacity_factor = self._capacity_factor("capacity_factor", capacity_factor)
        eval_capacity_factor = self._capacity_factor("eval_capacity_factor", eval_capacity_factor)
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor

    @torch.jit.unused
    def _capacity_factor(self, name: str, value: CapacityFactor) -> CapacityFactor:
        if value == DROPLESS and not self.takes_dropless:
            raise ValueError(f"{name} must be a number for {type(self).__name__}, got {value!r}")
        if value == DROPLESS and len(self.sizes.groups) > 1:
            raise ValueError(f"{name} must be a number for experts of several sizes, got {value!r}")
        return check_capacity_factor(name, value)

    def implementation(self) -> str:
        """`impl` as it is, or what can be recorded: without noise and losses, in operators that every reader has."""
        # Two lines, as TorchScript knows no tracers.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if is_recorded():
                return "reference" if self.training else "portable"
        return self.impl

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """LeCun normal, as the original: truncated at two standard deviations, variance 1 / D."""
        lecun_normal_(self.weight, fan_in=self.weight.shape[1])

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, num_experts={self.weight.shape[0]}"
