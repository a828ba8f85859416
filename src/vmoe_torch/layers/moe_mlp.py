"""MoeMlp: the sparse MLP of V-MoE (arXiv 2106.05974, section 2), a drop-in for timm's `Mlp`.

Dims: B images, L tokens per image, D width, H hidden width, E experts, K selected, G groups of S tokens, C slots.
Over 400 lines: a module's settings, their checks and the paths that read them, TorchScript's included, change together.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

import vmoe_kernels as kernels
from vmoe_kernels.activations import check_activation
from vmoe_torch.layers import options as opt
from vmoe_torch.layers.auxiliary import inject_auxiliary_loss
from vmoe_torch.layers.experts import ExpertLinear
from vmoe_torch.layers.losses import cv_squared, gshard_from_means
from vmoe_torch.layers.record import Record
from vmoe_torch.layers.routers import Router, expert_choice

ROUTERS = ("top_experts", "expert_choice")
AUXILIARY_MODES = ("injected", "manual")
GROUP_SIZES = {"batch": 0, "image": 1}


class MoeMlp(nn.Module):
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
        expert_drop: dropout inside the experts only; None is `drop`.
        importance_loss_weight: weight of the importance loss.
        load_loss_weight: weight of the load loss (training with noise).
        gshard_loss_weight: weight of the GShard loss.
        auxiliary_mode: "injected" (the gradient reaches the router by itself) or "manual" (add
            `vmoe_torch.auxiliary_loss(model)` to the loss).
        router: "top_experts" or "expert_choice".
        dispatch_dtype: None or "float32" for the layer's own, or "bfloat16" to round what goes into and comes out of
            the experts, as the released models were trained.
        renormalize_gates: whether the K gates of a token are scaled to sum to 1, as some upcycled models want it; the
            original does not.
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
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        one_of("auxiliary_mode", auxiliary_mode, AUXILIARY_MODES)
        one_of("router", router, ROUTERS)
        one_of("dispatch_dtype", dispatch_dtype, (None, "float32", "bfloat16"))
        one_of("capacity_rounding", capacity_rounding, ("ceil", "round"))
        one_of("impl", impl, ("auto", "triton", "reference"))
        if renormalize_gates and router != "top_experts":
            raise ValueError(f"renormalize_gates must be False unless router is 'top_experts', got router={router!r}")
        if noise_std < 0:
            raise ValueError(f"noise_std must be at least 0, got {noise_std}")
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        self.num_experts = num_experts
        self.capacity_rounding = capacity_rounding
        self.capacity_multiple_of = capacity_multiple_of or 0
        self.noise_std = float(noise_std)
        self.expert_drop = float(drop if expert_drop is None else expert_drop)
        self.importance_loss_weight = float(importance_loss_weight)
        self.load_loss_weight = float(load_loss_weight)
        self.gshard_loss_weight = float(gshard_loss_weight)
        self.auxiliary_mode = auxiliary_mode
        self.router_type = router
        self.dispatch_dtype = torch.bfloat16 if dispatch_dtype == "bfloat16" else None
        self.renormalize_gates = bool(renormalize_gates)
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
        if not 1 <= num_selected_experts <= self.num_experts or num_selected_experts != int(num_selected_experts):
            raise ValueError(
                f"num_selected_experts must be in 1..num_experts={self.num_experts}, got {num_selected_experts}"
            )
        if eval_capacity_factor is None:
            eval_capacity_factor = capacity_factor
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is None or not 0 < factor < math.inf:
                raise ValueError(f"{name} must be above 0, got {factor}")
        one_of("priority", priority, ("max", "sum"))
        images = group_images(group_size)
        self.num_selected_experts = int(num_selected_experts)
        self.capacity_factor = float(capacity_factor)
        self.eval_capacity_factor = float(eval_capacity_factor)
        self.batch_priority = bool(batch_priority)
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
    def _routed(self, tokens: Tensor, images: int, group: int, capacity: int, last_capacity: int) -> Tensor:
        noise_std = self.noise_std if self.training else 0.0
        drop = self.expert_drop if self.training else 0.0
        seeds = None
        if noise_std > 0 or drop > 0:
            seeds = torch.randint(2**31 - 1, (2,), device=tokens.device)
        router_weight = self.router.weight
        weights = [self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias]
        if self.exchange is not None:
            router_weight = self.exchange.local(router_weight)
            weights = [None if weight is None else self.exchange.local(weight) for weight in weights]
        if self.router_type == "expert_choice":
            gates, slots = self._choose_tokens(tokens, router_weight, group, capacity, last_capacity, noise_std)
        else:
            routing = kernels.route(
                tokens,
                router_weight,
                num_selected_experts=self.num_selected_experts,
                capacity=capacity,
                group_size=group,
                last_capacity=last_capacity,
                batch_priority=self.batch_priority,
                priority=self.priority,
                noise_std=noise_std,
                seed=None if seeds is None else seeds[0],
                impl=self.impl,
            )
            if self.choices is not None:
                experts = self.choices(routing.experts)
                slots = kernels.assign_slots(
                    experts,
                    routing.gates.detach(),
                    num_experts=self.num_experts,
                    capacity=capacity,
                    group_size=group,
                    last_capacity=last_capacity,
                    batch_priority=self.batch_priority,
                    priority=self.priority,
                    impl=self.impl,
                )
                routing = routing._replace(experts=experts, slots=slots)
            slots = routing.slots
            gates = self._remember(routing, images, group, noise_std)
            if self.renormalize_gates:
                gates = gates / gates.sum(-1, keepdim=True)
        rows = kernels.rows_per_expert(tokens.shape[0], group, capacity, last_capacity)
        seed = None if seeds is None else seeds[1]
        if tokens.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
            tokens = tokens.to(dtype)
            weights = [None if weight is None else weight.to(dtype) for weight in weights]
        options = {"activation": self.activation, "drop": drop, "seed": seed, "impl": self.impl}
        if self.exchange is None and self.dispatch_dtype is None:
            return kernels.moe_mlp(tokens, slots, gates, *weights, rows_per_expert=rows, **options)

        wire = self.dispatch_dtype or tokens.dtype
        sent = tokens.to(wire)
        if torch.compiler.is_exporting():
            # The rounded values: not every runtime can move bfloat16.
            sent = sent.to(tokens.dtype)
        buffer = kernels.dispatch(sent, slots, self.num_experts * rows, impl=self.impl)
        buffer = buffer.view(self.num_experts, rows, tokens.shape[1])

        part = itertools.count()

        def experts(rows: Tensor) -> Tensor:
            if drop > 0:
                # An exchange may bring the rows in parts: each has a mask of its own, from E keys of its own.
                options["seed"] = seed + next(part) * self.num_experts
            return kernels.expert_mlp(rows.to(tokens.dtype), *weights, **options).to(wire)

        out = experts(buffer) if self.exchange is None else self.exchange.run(buffer, experts)
        out = out.to(tokens.dtype).flatten(0, 1)
        return kernels.combine(out, slots, gates, impl=self.impl)

    def _choose_tokens(
        self, tokens: Tensor, router_weight: Tensor, group: int, capacity: int, last_capacity: int, noise_std: float
    ) -> tuple[Tensor, Tensor]:
        """Expert choice: gates and slots (T, E), one choice per expert; balanced, so no auxiliary loss."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = tokens.to(dtype) @ router_weight.to(dtype).t()
        if noise_std > 0:
            logits = logits + torch.randn_like(logits) * (noise_std / self.num_experts)
        gates = logits.softmax(-1)
        slots = expert_choice(gates, group, capacity, last_capacity)
        self.record.clear()
        if not torch.compiler.is_exporting():
            self.record.gates, self.record.slots = gates.detach(), slots
        return gates, slots

    def _remember(self, routing: kernels.Routing, images: int, group: int, noise_std: float) -> Tensor:
        """Records the routing, and sees to the auxiliary loss; returns the gates to use."""
        gates = routing.gates
        loss = None
        if self.training and routing.importance.shape[0] > 0:
            loss = self.auxiliary_loss(routing.importance, routing.load, routing.mean_gates, routing.top1_share)
            if self.auxiliary_mode == "injected":
                if loss.requires_grad:
                    gates = inject_auxiliary_loss(gates, loss)
                loss = loss.detach()
        if not torch.compiler.is_exporting():
            record = self.record
            record.gates, record.experts, record.slots = routing.gates.detach(), routing.experts, routing.slots
            record.importance, record.load = routing.importance.detach(), routing.load.detach()
            record.mean_gates, record.top1_share = routing.mean_gates.detach(), routing.top1_share.detach()
            record.loss, record.group_tokens, record.images = loss, group, images
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
        if self.dispatch_dtype is not None:
            # As `_routed`: what goes into the experts and what comes out is rounded.
            buffer = torch.ops.vmoe.dispatch(tokens.to(self.dispatch_dtype), slots, self.num_experts * rows)
            out = torch.ops.vmoe.expert_mlp(
                buffer.to(tokens.dtype).view(self.num_experts, rows, tokens.shape[1]),
                self.fc1.weight,
                self.fc1.bias,
                self.fc2.weight,
                self.fc2.bias,
                self.activation,
                0.0,
                None,
                False,
            )[0]
            return torch.ops.vmoe.combine(out.to(self.dispatch_dtype).to(tokens.dtype).flatten(0, 1), slots, weights)
        return torch.ops.vmoe.moe_mlp(
            tokens,
            slots,
            weights,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            rows,
            self.activation,
            0.0,
            None,
            False,
        )[0]

    def extra_repr(self) -> str:
        group = self.group_size or "batch"
        return (
            f"num_experts={self.num_experts}, num_selected_experts={self.num_selected_experts}, "
            f"capacity_factor={self.capacity_factor}, batch_priority={self.batch_priority}, group_size={group}, "
            f"activation={self.activation}"
        )


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """The value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def group_images(group_size: opt.GroupSize) -> int:
    """Images per group: a positive int, "image" (1) or "batch" (0)."""
    if isinstance(group_size, str):
        one_of("group_size", group_size, tuple(GROUP_SIZES))
        return GROUP_SIZES[group_size]
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be 'batch', 'image' or at least 1 image, got {group_size!r}")
    return group_size


def activation_name(act_layer: Any) -> str:
    """The kernels' name of an activation given as a name, a class or a partial of one."""
    name = act_layer
    if not isinstance(name, str):
        name = getattr(act_layer, "func", act_layer).__name__
        if name == "GELU" and getattr(act_layer, "keywords", {}).get("approximate") == "tanh":
            name = "gelu_tanh"
    name = {"gelutanh": "gelu_tanh"}.get(name.lower(), name.lower())
    try:
        check_activation(name)
    except ValueError as error:
        raise ValueError(f"act_layer of the experts: {error}") from None
    return name
