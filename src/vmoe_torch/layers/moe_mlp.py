"""MoeMlp: the sparse MLP of V-MoE (arXiv 2106.05974, section 2), a drop-in for timm's `Mlp`.

Dims: B images, L tokens per image, D width, H hidden width, E experts, K selected, G groups of S tokens, C slots.
Over 400 lines: a module's settings, their checks and the paths that read them, TorchScript's included, change together.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vmoe_kernels as kernels
from vmoe_kernels.common.checks import check_flag, check_integer, check_number, check_selected
from vmoe_torch.layers import options as opt
from vmoe_torch.layers import portable
from vmoe_torch.layers.auxiliary import inject_auxiliary_loss
from vmoe_torch.layers.choice import TravellingRouting
from vmoe_torch.layers.experts import ExpertLinear
from vmoe_torch.layers.losses import cv_squared, gshard_from_means
from vmoe_torch.layers.record import Record
from vmoe_torch.layers.recording import is_recorded, static_sizes
from vmoe_torch.layers.routers import Router, expert_choice, logits
from vmoe_torch.layers.scripted import run_experts
from vmoe_torch.layers.settings import activation_name, group_images, one_of

ROUTERS = ("top_experts", "expert_choice")
AUXILIARY_MODES = ("injected", "manual")
# The least number above 0.
_TINY = math.ulp(0.0)


class MoeMlp(TravellingRouting):
    """E expert MLPs of which every token uses K, under a bounded capacity.

    Args:
        in_features: D.
        hidden_features: H; D if not given.
        out_features: O; D if not given.
        act_layer: nn.GELU, timm's GELUTanh, nn.ReLU or nn.SiLU, or one of those names.
        norm_layer: not supported.
        bias: whether the experts have biases.
        drop: dropout inside the experts and on their combined output (timm's `drop`); see expert_drop.
        num_experts: E.
        num_selected_experts: K, in 1..E.
        capacity_factor: C = ceil(S * K * capacity_factor / E), then up to a multiple of capacity_multiple_of.
        eval_capacity_factor: the same in eval mode; None is capacity_factor.
        capacity_rounding: "ceil" or "round".
        capacity_multiple_of: 1 (or None) leaves the capacity as it is.
        batch_priority: Batch Priority Routing instead of position order.
        priority: "max" or "sum" of a token's gates, for BPR.
        group_size: images per group that is routed on its own, "batch" or "image". What remains of a batch forms one
            last, smaller group with its own capacity.
        noise_std: router noise in training, N(0, (noise_std / E)^2) per logit.
        expert_drop: dropout inside the experts only; None is `drop`. Every expert draws a mask of its own; the
            original's experts, unless its split_rngs says otherwise, share one.
        importance_loss_weight: weight of the importance loss.
        load_loss_weight: weight of the load loss (training with noise).
        gshard_loss_weight: weight of the GShard loss.
        auxiliary_mode: "injected" (the gradient reaches the router by itself) or "manual" (add
            `vmoe_torch.auxiliary_loss(model)` to the loss).
        router: "top_experts" or "expert_choice".
        dispatch_dtype: None or "float32" for the layer's own, or "bfloat16" to round what goes into and comes out of
            the experts, as the released models were trained.
        renormalize_gates: whether the K gates of a token are scaled to sum to 1, as some upcycled models want it; the
            original does not. With K=1 every gate is 1, and the router would learn nothing from the task: evaluated,
            but not trained.
        impl: "auto", "triton" or "reference".

    Shape:
        (B, L, D) -> (B, L, O); any dims may stand for L.

    A capacity drop makes a token's result depend on its group; group_size="image" keeps it inside the image.
    """

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
        num_selected_experts: int = 2,
        capacity_factor: float = 1.05,
        eval_capacity_factor: float | None = None,
        capacity_rounding: opt.CapacityRounding = "ceil",
        capacity_multiple_of: int | None = 4,
        batch_priority: bool = True,
        priority: opt.Priority = "max",
        group_size: opt.GroupSize = 8,
        noise_std: float = 1.0,
        expert_drop: float | None = None,
        importance_loss_weight: float = 0.005,
        load_loss_weight: float = 0.005,
        gshard_loss_weight: float = 0.0,
        auxiliary_mode: opt.AuxiliaryMode = "injected",
        router: opt.RouterType = "top_experts",
        dispatch_dtype: opt.DispatchDtype | None = None,
        renormalize_gates: bool = False,
        impl: opt.Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if norm_layer is not None:
            raise ValueError("norm_layer must be None: experts have no norm (scale_mlp_norm is not supported)")
        num_experts = check_integer("num_experts", num_experts, 1)
        one_of("auxiliary_mode", auxiliary_mode, AUXILIARY_MODES)
        one_of("router", router, ROUTERS)
        one_of("dispatch_dtype", dispatch_dtype, (None, "float32", "bfloat16"))
        one_of("capacity_rounding", capacity_rounding, ("ceil", "round"))
        one_of("impl", impl, ("auto", "triton", "reference"))
        renormalize_gates = check_flag("renormalize_gates", renormalize_gates)
        if renormalize_gates and router != "top_experts":
            raise ValueError(f"renormalize_gates must be False unless router is 'top_experts', got router={router!r}")
        drop = check_number("drop", drop, "in [0, 1)", 0.0, 1.0)
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        self.num_experts = num_experts
        self.capacity_rounding = capacity_rounding
        multiple_of = 0 if capacity_multiple_of is None else capacity_multiple_of
        self.capacity_multiple_of = check_integer("capacity_multiple_of", multiple_of, 0)
        self.noise_std = check_number("noise_std", noise_std, "at least 0", 0.0)
        self.expert_drop = (
            drop if expert_drop is None else check_number("expert_drop", expert_drop, "in [0, 1)", 0.0, 1.0)
        )
        self.importance_loss_weight = check_number("importance_loss_weight", importance_loss_weight, "at least 0", 0.0)
        self.load_loss_weight = check_number("load_loss_weight", load_loss_weight, "at least 0", 0.0)
        self.gshard_loss_weight = check_number("gshard_loss_weight", gshard_loss_weight, "at least 0", 0.0)
        self.auxiliary_mode = auxiliary_mode
        self.router_type = router
        self.dispatch_dtype = torch.bfloat16 if dispatch_dtype == "bfloat16" else None
        self.renormalize_gates = renormalize_gates
        self.impl = impl
        self.activation = activation_name(act_layer)
        self.set_routing(
            num_selected_experts=num_selected_experts,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            batch_priority=batch_priority,
            priority=priority,
            group_size=group_size,
        )
        self._made = self.routing()
        dd = {"device": device, "dtype": dtype}
        self.router = Router(in_features, num_experts, **dd)
        self.fc1 = ExpertLinear(num_experts, in_features, hidden_features, bias, **dd)
        self.fc2 = ExpertLinear(num_experts, hidden_features, out_features, bias, **dd)
        self.drop = nn.Dropout(drop)
        # Installed from outside by vmoe_torch.parallel: moves rows between the ranks that hold the experts.
        self.exchange = None
        # Installed from outside by vmoe_torch.analyze: takes the router's experts (T, K) and gives others.
        self.choices = None
        self.record = Record()

    def set_routing(
        self,
        *,
        num_selected_experts: int,
        capacity_factor: float,
        eval_capacity_factor: float | None,
        batch_priority: bool,
        priority: opt.Priority,
        group_size: opt.GroupSize,
    ) -> None:
        """Checks and sets everything that may change after training; on an error nothing changes."""
        num_selected_experts = check_selected(num_selected_experts, self.num_experts)
        if eval_capacity_factor is None:
            eval_capacity_factor = capacity_factor
        capacity_factor = check_number("capacity_factor", capacity_factor, "above 0", _TINY)
        eval_capacity_factor = check_number("eval_capacity_factor", eval_capacity_factor, "above 0", _TINY)
        batch_priority = check_flag("batch_priority", batch_priority)
        one_of("priority", priority, ("max", "sum"))
        images = group_images(group_size)
        self.num_selected_experts = num_selected_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.batch_priority = batch_priority
        self.priority = priority
        # Images per group; 0 is the whole batch.
        self.group_size = images

    def capacity(self, group_tokens: int) -> int:
        """C for a group of so many tokens, in the current mode; never more than the tokens that could fill it."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        selected = self.num_selected_experts if self.router_type == "top_experts" else 1
        capacity = kernels.compute_capacity(
            group_tokens,
            self.num_experts,
            factor,
            num_selected_experts=selected,
            rounding=self.capacity_rounding,
            multiple_of=self.capacity_multiple_of,
        )
        return min(capacity, group_tokens) if self.router_type == "top_experts" else capacity

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        # Two lines: of a condition with two parts, TorchScript would compile both.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if is_recorded():
                return self._recorded(x, tokens)
        per_image = 1
        for size in x.shape[1:-1]:
            per_image *= size
        group, capacity, last_capacity = self._groups(tokens.shape[0], per_image)
        if torch.jit.is_scripting():
            y = self._scripted(tokens, group, capacity, last_capacity)
        else:
            y = self._routed(tokens, x.shape[0], group, capacity, last_capacity)
        return self.drop(y).reshape(x.shape[:-1] + (y.shape[-1],))

    def _groups(self, num_tokens: int, per_image: int) -> tuple[int, int, int]:
        """Tokens per group, slots per expert in a group, and in a smaller last one."""
        if num_tokens == 0:
            return 1, 1, 1
        group = num_tokens
        if self.group_size == 1:
            # No comparison: in an export with a dynamic batch, the group and its capacity stay numbers.
            group = per_image
        elif self.group_size > 1:
            group = min(self.group_size * per_image, num_tokens)
        capacity = self.capacity(group)
        rest = num_tokens % group
        return group, capacity, self.capacity(rest) if rest > 0 else capacity

    @torch.jit.unused
    def _recorded(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The forward that tracers record; the number of images is fixed unless groups or the exporter free it."""
        if self.training and torch.onnx.is_in_onnx_export():
            raise ValueError("a MoeMlp must be in eval mode for ONNX, got one in training mode")
        sizes = static_sizes(x)
        per_image, num_tokens = math.prod(sizes[1:-1]), math.prod(sizes[:-1])
        symbolic = isinstance(num_tokens, torch.SymInt)
        top_experts = self.router_type == "top_experts"
        if symbolic and self.group_size != 1 and not (self.group_size and top_experts):
            raise ValueError(
                "group_size must be 'image', or for top_experts a number of images, where the batch is dynamic, got "
                f"{self.group_size or 'batch'!r}: vmoe_torch.set_routing changes it"
            )
        if symbolic and self.group_size > 1:
            group = self.group_size * per_image
            capacity = self.capacity(group)
            last_capacity = portable.last_capacities(per_image, self.group_size, self.capacity)
        else:
            group, capacity, last_capacity = self._groups(num_tokens, per_image)
            if self.group_size == 1 and top_experts and not self.training and self.choices is None:
                last_capacity = None
        y = self._routed(tokens, sizes[0], group, capacity, last_capacity)
        return self.drop(y).reshape(x.shape[:-1] + (y.shape[-1],))

    @torch.jit.unused
    def _routed(self, tokens: Tensor, images: int, group: int, capacity: int, last_capacity: int) -> Tensor:
        noise_std = self.noise_std if self.training else 0.0
        drop = self.expert_drop if self.training else 0.0
        seeds = None
        if noise_std > 0 or drop > 0:
            seeds = torch.randint(2**31 - 1, (2,), device=tokens.device)
        recorded = is_recorded()
        impl = "reference" if recorded else self.impl
        # Noise, losses and `choices` need the twins with all that they compute.
        steps = portable if recorded and not self.training and self.choices is None else kernels
        local = (lambda weight: weight) if self.exchange is None else self.exchange.local
        if self.router_type == "expert_choice":
            gates, slots = self._choose_tokens(tokens, local, group, capacity, last_capacity, noise_std)
        else:
            groups = {"capacity": capacity, "group_size": group, "last_capacity": last_capacity}
            order = {"batch_priority": self.batch_priority, "priority": self.priority, "impl": impl}
            noise = {"noise_std": noise_std, "seed": None if seeds is None else seeds[0]}
            selected = {"num_selected_experts": self.num_selected_experts}
            used: list[Tensor] = []

            def route(x: Tensor, weight: Tensor) -> kernels.Routing:
                used.append(local(weight))
                return steps.route(x, used[0], **selected, **groups, **order, **noise)

            routed = self.router(tokens, route)
            # A hook may have put a plain tuple in its place.
            routing = kernels.Routing(*routed)
            if self.choices is not None:
                experts = self.choices(routing.experts)
                gates = routing.gates.detach()
                slots = kernels.assign_slots(experts, gates, num_experts=self.num_experts, **groups, **order)
                routing = routing._replace(experts=experts, slots=slots)
            slots = routing.slots
            gates = routing.gates
            if steps is kernels:
                gates = self._remember(routing, used[0] if used else None, images, group)
            else:
                self.record.clear()
            if self.renormalize_gates:
                if self.training and self.num_selected_experts == 1 and gates.requires_grad:
                    raise ValueError(
                        "num_selected_experts must be at least 2 in training with renormalize_gates, got 1: every gate "
                        "is 1, and the router learns nothing from the task"
                    )
                gates = gates / gates.sum(-1, keepdim=True)
        num_tokens = static_sizes(tokens)[0] if isinstance(last_capacity, int) else tokens.shape[0]
        rows = steps.rows_per_expert(num_tokens, group, capacity, last_capacity)
        options = {"activation": self.activation, "drop": drop, "impl": impl}

        def run(tokens: Tensor, *weights: Tensor | None) -> Tensor:
            return self._run_experts(steps, tokens, slots, gates, weights, rows, seeds, options)

        return self._through_experts(tokens, run)

    def _through_experts(self, tokens: Tensor, run: Callable) -> Tensor:
        """Calls `run` with the tokens and the parameters, from inside the calls of the modules that own these."""
        if torch.compiler.is_exporting() or is_recorded():
            # A graph holds the parameters anyway, and its modules must not call their siblings.
            return run(tokens, *self.fc1(tokens, _parameters), *self.fc2(tokens, _parameters))
        return self.fc1(tokens, lambda x, *fc1: self.fc2(x, lambda x, *fc2: run(x, *fc1, *fc2)))

    def _run_experts(
        self,
        steps,
        tokens: Tensor,
        slots: Tensor,
        gates: Tensor,
        weights: tuple[Tensor | None, ...],
        rows: int,
        seeds: Tensor | None,
        options: dict,
    ) -> Tensor:
        """Dispatch, experts and combine, with `steps` from vmoe_kernels or `portable`."""
        seed = None if seeds is None else seeds[1]
        if self.exchange is not None:
            weights = [None if weight is None else self.exchange.local(weight) for weight in weights]
        if tokens.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
            tokens = tokens.to(dtype)
            weights = [None if weight is None else weight.to(dtype) for weight in weights]
        if self.exchange is None and self.dispatch_dtype is None:
            return steps.moe_mlp(tokens, slots, gates, *weights, rows_per_expert=rows, seed=seed, **options)

        wire = self.dispatch_dtype or tokens.dtype
        sent = tokens.to(wire)
        if torch.compiler.is_exporting() or is_recorded():
            # The rounded values: not every runtime can move bfloat16.
            sent = sent.to(tokens.dtype)
        buffer = steps.dispatch(sent, slots, self.num_experts * rows, impl=options["impl"])
        buffer = buffer.view(self.num_experts, rows, tokens.shape[1])

        part = itertools.count()

        def experts(rows: Tensor) -> Tensor:
            # An exchange may bring the rows in parts: each has a mask of its own, from E keys of its own.
            own = None if seed is None else seed + next(part) * self.num_experts
            return steps.expert_mlp(rows.to(tokens.dtype), *weights, seed=own, **options).to(wire)

        out = experts(buffer) if self.exchange is None else self.exchange.run(buffer, experts)
        out = out.to(tokens.dtype).flatten(0, 1)
        return steps.combine(out, slots, gates, impl=options["impl"])

    def _choose_tokens(
        self, tokens: Tensor, local: Callable, group: int, capacity: int, last_capacity: int, noise_std: float
    ) -> tuple[Tensor, Tensor]:
        """Expert choice: gates and slots (T, E), one choice per expert; balanced, so no auxiliary loss."""
        scores = self.router(tokens, lambda x, weight: logits(x, local(weight)))
        if noise_std > 0:
            scores = scores + torch.randn_like(scores) * (noise_std / self.num_experts)
        gates = scores.softmax(-1)
        slots = expert_choice(gates, group, capacity, last_capacity)
        self.record.clear()
        if not torch.compiler.is_exporting() and not is_recorded():
            self.record.gates, self.record.slots = gates.detach(), slots
            self.record.leave_transforms()
        return gates, slots

    def _remember(self, routing: kernels.Routing, router_weight: Tensor | None, images: int, group: int) -> Tensor:
        """Records the routing, and sees to the auxiliary loss; returns the gates to use."""
        gates = routing.gates
        loss = None
        if self.training and routing.importance.shape[0] > 0:
            loss = self.auxiliary_loss(routing.importance, routing.load, routing.mean_gates, routing.top1_share)
            if self.auxiliary_mode == "injected":
                if loss.requires_grad:
                    gates = inject_auxiliary_loss(gates, loss, router_weight)
                loss = loss.detach()
        if torch.compiler.is_compiling():
            self.record.losses = []
        else:
            gates = self.record.keep(gates, loss)
        if not torch.compiler.is_exporting():
            record = self.record
            record.gates, record.experts, record.slots = routing.gates.detach(), routing.experts, routing.slots
            record.importance, record.load = routing.importance.detach(), routing.load.detach()
            record.mean_gates, record.top1_share = routing.mean_gates.detach(), routing.top1_share.detach()
            record.loss, record.group_tokens, record.images = loss, group, images
            record.leave_transforms()
        return gates

    def auxiliary_loss(self, importance: Tensor, load: Tensor, mean_gates: Tensor, top1_share: Tensor) -> Tensor:
        """Weighted losses of every group, (G, E) sums and means each, averaged over groups; 0-dim.

        Losses of weight 0 are left out; the load loss needs training and noise.
        """
        loss = importance.new_zeros(())
        if self.importance_loss_weight > 0:
            loss = loss + self.importance_loss_weight * cv_squared(importance).mean()
        if self.load_loss_weight > 0 and self.training and self.noise_std > 0:
            loss = loss + self.load_loss_weight * cv_squared(load).mean()
        if self.gshard_loss_weight > 0:
            loss = loss + self.gshard_loss_weight * gshard_from_means(top1_share, mean_gates).mean()
        return loss

    def _scripted(self, tokens: Tensor, group: int, capacity: int, last_capacity: int) -> Tensor:
        """TorchScript's forward: inference on the registered ops."""
        if self.training or self.router_type != "top_experts":
            raise RuntimeError("a scripted MoeMlp must be in eval mode and route by top_experts")
        scored = torch.ops.vmoe.router(tokens, self.router.weight, self.num_selected_experts, group, 0.0, None)
        gates = scored[0]
        weights = gates / gates.sum(-1, keepdim=True) if self.renormalize_gates else gates
        slots = torch.ops.vmoe.assign_slots(
            scored[1], gates, self.num_experts, group, capacity, last_capacity, self.batch_priority, self.priority
        )
        rest = tokens.shape[0] % group
        rows = tokens.shape[0] // group * capacity + (last_capacity if rest > 0 else 0)
        return run_experts(
            tokens,
            slots,
            weights,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            rows,
            self.activation,
            self.dispatch_dtype,
        )

    def extra_repr(self) -> str:
        group = self.group_size or "batch"
        return (
            f"num_experts={self.num_experts}, num_selected_experts={self.num_selected_experts}, "
            f"capacity_factor={self.capacity_factor}, batch_priority={self.batch_priority}, group_size={group}, "
            f"activation={self.activation}"
        )


def _parameters(_, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a linear layer's call hands out where the parameters are wanted."""
    return weight, bias
