"""Muon for models with experts: every expert's matrix is made orthogonal by itself.

timm's Muon takes a stack of matrices (E, out, in) for one matrix, or leaves it to AdamW, while it updates the dense
MLPs that experts replace: a comparison of the two would be one of optimisers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import unwrap
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vmoe_kernels.experts.cpu import has_products
from vmoe_torch.control import moe_layers


class FloatProducts(TorchFunctionMode):
    """Products of bfloat16 on a CPU, made of float32: sums in float32, rounded once, as by instructions for bfloat16.

    Of `torch.addmm` and `torch.baddbmm` with out=, which are timm's Muon's.
    """

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, a product with its factors in float32."""
        kwargs = kwargs or {}
        if func in (torch.addmm, torch.baddbmm) and "out" in kwargs:
            out = kwargs["out"]
            if out.dtype is torch.bfloat16 and out.device.type == "cpu":
                others = {name: value for name, value in kwargs.items() if name != "out"}
                return out.copy_(func(*(each.float() for each in args), **others))
        return func(*args, **kwargs)


def products(optimizer: Muon) -> AbstractContextManager:
    """How its updates are multiplied: as timm does, or by `FloatProducts` where that takes a CPU too long."""
    on_cpu = any(each.device.type == "cpu" for group in optimizer.param_groups for each in group["params"])
    return FloatProducts() if on_cpu and not has_products(torch.bfloat16) else nullcontext()


class ExpertMuon(Muon):
    """timm's Muon, with groups of parameters that say `experts=True`: stacks of matrices (E, out, in), each its own.

    timm makes matrices orthogonal by products of bfloat16, on any device. A CPU without instructions for them makes
    them of float32 here, see `FloatProducts`.

    What it keeps of a stack has the stack's shape and layout, so a checkpoint or a sharding of experts fits it too.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `closure` computes the gradients anew and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._as_kernels(), products(self):
            # Hooks of steps run once: they are around this method already.
            unwrap(Muon.step)(self)
        return loss

    @contextmanager
    def _as_kernels(self) -> Iterator[None]:
        """Shows each stack as a convolution's kernel (out, in, E), whose positions timm makes orthogonal one by one."""
        groups = [group for group in self.param_groups if group.get("experts")]
        kept = [group["params"] for group in groups]
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in groups:
            kernels = []
            for stack in group["params"]:
                kernel = nn.Parameter(stack.detach().permute(1, 2, 0))
                kernel.grad = None if stack.grad is None else stack.grad.permute(1, 2, 0)
                pairs.append((stack, kernel))
                kernels.append(kernel)
            group["params"] = kernels
        self._hand_over(pairs, (1, 2, 0))
        try:
            yield
        finally:
            for group, stacks in zip(groups, kept):
                group["params"] = stacks
            self._hand_over([(kernel, stack) for stack, kernel in pairs], (2, 0, 1))

    def _hand_over(self, pairs: list[tuple[nn.Parameter, nn.Parameter]], order: tuple[int, int, int]) -> None:
        """Gives the first's state to the second, its dims in another order."""
        for giver, taker in pairs:
            if giver in self.state:
                state = self.state.pop(giver)
                self.state[taker] = {
                    name: each.permute(order) if isinstance(each, Tensor) and each.ndim == 3 else each
                    for name, each in state.items()
                }


def create_muon(model: nn.Module, opt: str = "muon", **options: Any) -> ExpertMuon:
    """timm's `create_optimizer_v2` of a Muon that makes each expert's matrices orthogonal.

    The routers, and vectors as everywhere (the experts' biases, which look like matrices), are left to AdamW, at
    `lr * fallback_lr_scale`.

    Args:
        model: any model, with MoE layers or without.
        opt: one of timm's names of Muon: "muon", "nmuon", "adamuon", "nadamuon".
        options: what `create_optimizer_v2` takes (lr, weight_decay, layer_decay, ...), `fallback_list` included.

    Raises:
        ValueError: if timm's optimiser of this name is none of Muon's.
    """
    layers = moe_layers(model)
    stacks = {id(linear.weight) for moe in layers.values() for fc in (moe.fc1, moe.fc2) for linear in fc.linears()}
    dense = (moe.shared_expert for moe in layers.values() if moe.shared_expert is not None)
    matrices = stacks | {id(fc.weight) for shared in dense for fc in (shared.fc1, shared.fc2)}
    fallback = tuple(
        f"{layer}.{name}"
        for layer, moe in layers.items()
        for name, parameter in moe.named_parameters()
        if id(parameter) not in matrices
    )
    fallback += tuple(options.pop("fallback_list", ()))
    optimizer = create_optimizer_v2(model, opt=opt, fallback_list=fallback, **options)
    if not isinstance(optimizer, Muon):
        raise ValueError(f"opt must be one of timm's Muon optimisers, got {opt!r}")
    groups = []
    for group in optimizer.param_groups:
        own = set() if group.get("use_fallback") else stacks
        experts, others = (
            [each for each in group["params"] if (id(each) in own) == wanted] for wanted in (True, False)
        )
        if others:
            groups.append({**group, "params": others})
        if experts:
            # The scale is that of a matrix, whatever their number.
            chosen = {"experts": True, "use_muon": True, "conv_mode": "batched", "normalize_spatial": False}
            groups.append({**group, "params": experts, **chosen})
    return ExpertMuon(groups, **optimizer.defaults)
