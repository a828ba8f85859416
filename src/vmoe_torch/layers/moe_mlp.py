"""MoeMlp: the sparse MLP of V-MoE (arXiv 2106.05974, section 2), a drop-in for timm's `Mlp`.

It groups the tokens, has its router route them (`routers`), and runs the experts, here or through an exchange.

Dims: B images, L tokens per image, D width, H and O widths of experts, E experts, T tokens, R rows per expert.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from vmoe_kernels.common.checks import check_integer, check_number
from vmoe_torch.layers import experts_by_size, mixing, portable, steps
from vmoe_torch.layers import options as opt
from vmoe_torch.layers.choice import TravellingRouting
from vmoe_torch.layers.delegation import OfRouter
from vmoe_torch.layers.experts import Weights, parameters
from vmoe_torch.layers.groups import Groups, grouped
from vmoe_torch.layers.record import Record
from vmoe_torch.layers.recording import is_recorded, static_sizes
from vmoe_torch.layers.routers import ROUTERS
from vmoe_torch.layers.routers.base import Routed, Router
from vmoe_torch.layers.settings import activation_name, group_images, one_of, refuse_dropless
from vmoe_torch.layers.shared import shared_flops, shared_mlp
from vmoe_torch.layers.sizes import resolve_sizes

_OWN = {"num_experts", "expert_hidden", "shared_expert_hidden", "group_size", "expert_drop", "router", "dispatch_dtype"}
# The options that are the router's to check and to keep.
_OF_ROUTER = get_type_hints(opt.MoeOptions).keys() - _OWN
# Of a layer that was told nothing else.
GROUP_SIZE = 8


class MoeMlp(TravellingRouting):
    """E expert MLPs of which every token uses K, under a bounded capacity.

    Args:
        in_features: D.
        hidden_features: H; D if not given.
        out_features: O; D if not given.
        act_layer: nn.GELU, timm's GELUTanh, nn.ReLU or nn.SiLU, or one of those names.
        norm_layer: not supported.
        bias: whether the experts have biases.
        drop: dropout inside the experts and on their combined output (timm's `drop`); see `expert_drop`.
        num_experts: E.
        device: of the parameters.
        dtype: of the parameters.

    All other arguments are described in `vmoe_torch.layers.options.MoeOptions`.

    Shape:
        (B, L, D) -> (B, L, O); any dims may stand for L.

    A capacity drop makes a token's result depend on its group; group_size="image" keeps it inside the image, and with
    capacity_factor="dropless" there is none.
    """

    num_selected_experts = OfRouter()
    capacity_factor = OfRouter()
    eval_capacity_factor = OfRouter()
    capacity_rounding = OfRouter()
    capacity_multiple_of = OfRouter()
    batch_priority = OfRouter()
    priority = OfRouter()
    mean_selected_experts = OfRouter()
    gate_threshold = OfRouter()
    noise_std = OfRouter()
    slots_per_expert = OfRouter()
    importance_loss_weight = OfRouter()
    load_loss_weight = OfRouter()
    gshard_loss_weight = OfRouter()
    size_loss_weight = OfRouter()
    router_z_loss_weight = OfRouter()
    auxiliary_mode = OfRouter()
    renormalize_gates = OfRouter()
    impl = OfRouter()

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Any = nn.GELU,
        norm_layer: None = None,
        bias: bool = True,
        drop: float = 0.0,
        num_experts: int = 32,
        expert_hidden: Sequence[int | float] | int | float | None = None,
        shared_expert_hidden: int | float | None = None,
        num_selected_experts: int = 2,
        capacity_factor: opt.CapacityFactor = 1.05,
        eval_capacity_factor: opt.CapacityFactor | None = None,
        capacity_rounding: opt.CapacityRounding = "ceil",
        capacity_multiple_of: int | None = 4,
        batch_priority: bool = True,
        priority: opt.Priority = "max",
        group_size: opt.GroupSize = GROUP_SIZE,
        mean_selected_experts: opt.MeanSelectedExperts = None,
        gate_threshold: float | None = None,
        noise_std: float | None = None,
        expert_drop: float | None = None,
        importance_loss_weight: float = 0.005,
        load_loss_weight: float = 0.005,
        gshard_loss_weight: float = 0.0,
        size_loss_weight: float = 0.0,
        router_z_loss_weight: float = 0.0,
        auxiliary_mode: opt.AuxiliaryMode = "injected",
        router: opt.RouterType = "top_experts",
        slots_per_expert: int | None = None,
        dispatch_dtype: opt.DispatchDtype | None = None,
        renormalize_gates: bool = False,
        impl: opt.Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        # Before there is any other local name.
        given = locals()
        super().__init__()
        if norm_layer is not None:
            raise ValueError("norm_layer must be None: experts have no norm (scale_mlp_norm is not supported)")
        num_experts = check_integer("num_experts", num_experts, 1)
        one_of("router", router, tuple(ROUTERS))
        one_of("dispatch_dtype", dispatch_dtype, (None, "float32", "bfloat16"))
        images = group_images(group_size)
        drop = check_number("drop", drop, "in [0, 1)", 0.0, 1.0)
        expert_drop = drop if expert_drop is None else expert_drop
        self.expert_drop = check_number("expert_drop", expert_drop, "in [0, 1)", 0.0, 1.0)
        self.dispatch_dtype = torch.bfloat16 if dispatch_dtype == "bfloat16" else None
        self.activation = activation_name(act_layer)
        self.hidden_features = hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        dd = {"device": device, "dtype": dtype}
        self.num_experts = num_experts
        self.router_type = router
        self.sizes = resolve_sizes(expert_hidden, num_experts, hidden_features)
        self.expert_hidden = self.sizes.hidden
        options = {name: given[name] for name in _OF_ROUTER}
        self.router = ROUTERS[router](in_features, num_experts, **dd, expert_hidden=self.expert_hidden, **options)
        # Images per group; 0 is the whole batch.
        self.group_size = self.router.images(images, left_out=images == GROUP_SIZE)
        self._made = self.routing()
        self.fc1, self.fc2 = experts_by_size.expert_linears(self.sizes, in_features, out_features, bias, **dd)
        self.drop = nn.Dropout(drop)
        widths, drops = (in_features, hidden_features, out_features), (self.expert_drop, drop)
        self.shared_expert = shared_mlp(shared_expert_hidden, widths, self.activation, bias, drops, **dd)
        # Installed from outside by vmoe_torch.parallel: moves rows between the ranks that hold the experts.
        self.exchange = None
        self.ranks = 1
        self.record = Record()

    @torch.jit.unused
    def own_router(self) -> Router:
        """`router`, or the router in it: adapters put a module of theirs around it."""
        if isinstance(self.router, Router):
            return self.router
        return next(module for module in self.router.modules() if isinstance(module, Router))

    @torch.jit.unused
    def routing(self) -> dict[str, Any]:
        """How the layer routes now, as `set_routing` takes it."""
        return {**self.own_router().routing(), "group_size": self.group_size or "batch"}

    @torch.jit.unused
    def set_routing(self, *, group_size: opt.GroupSize, **settings: Any) -> None:
        """Checks and sets everything that may change after training, the router's settings too; all or nothing."""
        images = self.own_router().images(group_images(group_size))
        self.own_router().set_routing(**settings)
        self.group_size = images

    @torch.jit.unused
    def routing_note(self) -> str:
        """What there is to say of a layer where other routing cannot be set."""
        return self.own_router().NOTE

    def capacity(self, group_tokens: int) -> int:
        """C for a group of so many tokens, in the current mode."""
        if torch.jit.is_scripting():
            return self.router.capacity(group_tokens)
        return self.own_router().capacity(group_tokens)

    @torch.jit.unused
    def flops(self, tokens: int, rows: int) -> int:
        """FLOPs of so many tokens in so many rows of all experts together: router, shared expert and experts."""
        flops = self.own_router().flops(tokens) + shared_flops(self.shared_expert, tokens)
        return flops + self.expert_flops(rows)

    @torch.jit.unused
    def expert_flops(self, rows: int) -> int:
        """FLOPs of so many rows of all experts together, as many of each, 2 * (D + O) * rows * mean(H_e)."""
        return experts_by_size.flops(self.sizes, self.fc1, self.fc2, [rows] * self.num_experts) // self.num_experts

    @torch.jit.unused
    def filled_flops(self) -> int:
        """FLOPs of the rows that the last forward filled with a token, 2 * (D + O) * sum(H_e * n_e)."""
        if self.own_router().slots_per_expert is not None:
            # A mixture fills every slot.
            return self.expert_flops(self.record.num_slots(self.num_experts))
        rows = self.record.kept_experts().bincount(minlength=self.num_experts).tolist()
        return experts_by_size.flops(self.sizes, self.fc1, self.fc2, rows)

    def groups(self, num_tokens: int, per_image: int) -> Groups:
        """Groups of so many tokens, of images of so many each, in the current mode."""
        if num_tokens == 0:
            return grouped(0, 1, 1, 1)
        size = num_tokens
        if self.group_size == 1:
            # No comparison: in an export with a dynamic batch, the group and its capacity stay numbers.
            size = per_image
        elif self.group_size > 1:
            size = min(self.group_size * per_image, num_tokens)
        capacity = self.capacity(size)
        rest = num_tokens % size
        return grouped(num_tokens, size, capacity, self.capacity(rest) if rest > 0 else capacity)

    @torch.jit.unused
    def num_rows(self, num_tokens: int, per_image: int) -> int:
        """Rows that all experts together process of so many tokens, in the current mode; empty slots count."""
        router = self.own_router()
        if router.is_dropless():
            return router.dropless_rows(num_tokens)
        return self.num_experts * self.groups(num_tokens, per_image).rows

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError("a scripted MoeMlp must be in eval mode")
            per_image = 1
            for size in x.shape[1:-1]:
                per_image *= size
            groups = self.groups(tokens.shape[0], per_image)
            routed = self.router.infer(tokens, groups)
            # Appended: a saved script would read a list of its own narrower type.
            weights: list[Weights] = []
            weights.append((self.fc1.floating_weight(), self.fc1.bias, self.fc2.floating_weight(), self.fc2.bias))
            y = self.run_experts(tokens, routed, routed.gates, weights, [self.num_experts], groups.rows, None, "auto")
        else:
            y = self._routed(x, tokens)
        y = self.drop(y).reshape(x.shape[:-1] + (y.shape[-1],))
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return y

    @torch.jit.unused
    def _routed(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Inside the calls of the modules that own the parameters, so that hooks act in time on what is read."""
        router = self.own_router()
        impl = router.implementation()
        if is_recorded():
            groups = self._recorded_groups(x, tokens)
        else:
            groups = self.groups(tokens.shape[0], math.prod(x.shape[1:-1]))
        seeds = None
        if self.training and (router.noise_std > 0 or self.expert_drop > 0):
            seeds = torch.randint(2**31 - 1, (2,), device=tokens.device)
        # A hook may have put a plain tuple in its place.
        routed = Routed(*self.router(tokens, groups, None if seeds is None else seeds[0]))
        gates = self._remember(routed, groups)

        def run(tokens: Tensor, *weights: Tensor | None) -> Tensor:
            if self.exchange is not None:
                weights = tuple(None if weight is None else self.exchange.local(weight) for weight in weights)
            if tokens.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tokens.device.type):
                dtype = torch.get_autocast_dtype(tokens.device.type)
                tokens = tokens.to(dtype)
                weights = tuple(None if weight is None else weight.to(dtype) for weight in weights)
            seed = None if seeds is None else seeds[1]
            if routed.spans is not None:
                return self._run_dropless(tokens, routed, gates, weights, seed, impl)
            placed = routed._replace(slots=self.sizes.place(routed.slots, groups.rows, self.ranks))
            sized, counts = experts_by_size.by_size(weights), self.sizes.counts(self.ranks)
            return self.run_experts(tokens, placed, gates, sized, counts, groups.rows, seed, impl)

        if torch.compiler.is_exporting() or is_recorded():
            # A graph holds the parameters anyway, and its modules must not call their siblings.
            return run(tokens, *self.fc1(tokens, parameters), *self.fc2(tokens, parameters))
        return self.fc1(tokens, lambda x, *fc1: self.fc2(x, lambda x, *fc2: run(x, *fc1, *fc2)))

    @torch.jit.unused
    def _recorded_groups(self, x: Tensor, tokens: Tensor) -> Groups:
        """Groups for tracers; the number of images is fixed unless groups or the exporter free it."""
        if self.training and torch.onnx.is_in_onnx_export():
            raise ValueError("a MoeMlp must be in eval mode for ONNX, got one in training mode")
        sizes = static_sizes(x)
        per_image, num_tokens = math.prod(sizes[1:-1]), math.prod(sizes[:-1])
        free = self.own_router().takes_any_batch
        symbolic = isinstance(num_tokens, torch.SymInt)
        if symbolic and self.group_size != 1 and not (self.group_size and free):
            raise ValueError(
                "group_size must be 'image', or for top_experts and threshold a number of images, where the batch is "
                f"dynamic, got {self.group_size or 'batch'!r}: vmoe_torch.set_routing changes it"
            )
        if symbolic and self.group_size > 1:
            size = self.group_size * per_image
            last = portable.last_capacities(per_image, self.group_size, self.capacity)
            return portable.open_groups(num_tokens, size, self.capacity(size), last)
        if self.group_size == 1 and free and not self.training:
            return portable.open_groups(tokens.shape[0], per_image, self.capacity(per_image), None)
        return self.groups(num_tokens, per_image)

    def _remember(self, routed: Routed, groups: Groups) -> Tensor:
        """Records the routing; returns the gates to use."""
        if is_recorded():
            self.record.clear()
            return routed.gates
        gates = routed.gates
        if torch.compiler.is_compiling():
            self.record.losses = []
        else:
            gates = self.record.keep(gates, routed.record.get("loss"))
        if not torch.compiler.is_exporting():
            self.record.note(routed, groups)
        return gates

    def run_experts(
        self,
        tokens: Tensor,
        routed: Routed,
        gates: Tensor,
        weights: list[Weights],
        counts: list[int],
        rows: int,
        seed: Tensor | None,
        impl: str,
    ) -> Tensor:
        """Dispatch, experts and combine: (T, D) to (T, O)."""
        drop = self.expert_drop if self.training else 0.0
        slots, mix = routed.slots, routed.mix
        if mix is None and self.exchange is None and self.dispatch_dtype is None and impl != "portable":
            choices: Tensor | None = None
            if not torch.jit.is_scripting():
                choices = routed.choices
            return experts_by_size.moe_mlp(
                tokens, slots, gates, weights, counts, rows, self.activation, drop, seed, impl, choices
            )
        wire = tokens.dtype
        if self.dispatch_dtype is not None:
            wire = self.dispatch_dtype
        sent = tokens.to(wire)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if torch.compiler.is_exporting() or is_recorded():
                # The rounded values: not every runtime can move bfloat16.
                sent = sent.to(tokens.dtype)
        buffer = mixing.fill(sent, slots, mix, self.num_experts, rows, impl)
        if self.exchange is None:
            rows_in = buffer.to(tokens.dtype)
            out = experts_by_size.expert_mlp(rows_in, weights, counts, self.activation, drop, seed, impl).to(wire)
        else:
            out = self._exchanged(buffer, weights, counts, tokens.dtype, seed, impl)
        return mixing.collect(out.to(tokens.dtype), slots, mix, gates, impl)

    @torch.jit.unused
    def _run_dropless(
        self, tokens: Tensor, routed: Routed, gates: Tensor, weights: Weights, seed: Tensor | None, impl: str
    ) -> Tensor:
        """The same without capacities."""
        if self.exchange is not None and self.exchange.size > 1:
            refuse_dropless(self.exchange.size)
        drop = self.expert_drop if self.training else 0.0
        return steps.dropless_mlp(
            tokens, routed.slots, routed.spans, gates, weights, self.activation, drop, seed, impl, self.dispatch_dtype
        )

    @torch.jit.unused
    def _exchanged(
        self,
        buffer: Tensor,
        weights: list[Weights],
        counts: list[int],
        dtype: torch.dtype,
        seed: Tensor | None,
        impl: str,
    ) -> Tensor:
        """(E, R, D) to (E, R, O) by way of the ranks that hold the experts."""
        drop = self.expert_drop if self.training else 0.0
        part = itertools.count()

        def experts(rows: Tensor) -> Tensor:
            # Rows may come in parts: each has a mask of its own, from E keys of its own.
            own = None if seed is None else seed + next(part) * self.num_experts
            out = experts_by_size.expert_mlp(rows.to(dtype), weights, counts, self.activation, drop, own, impl)
            return out.to(buffer.dtype)

        return self.exchange.run(buffer, experts)

    def extra_repr(self) -> str:
        routing = ", ".join(f"{name}={value}" for name, value in self.routing().items())
        sizes = f"expert_hidden={self.expert_hidden}, " if len(self.sizes.groups) > 1 else ""
        return f"num_experts={self.num_experts}, {sizes}{routing}, activation={self.activation}"
