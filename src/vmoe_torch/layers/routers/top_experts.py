"""The paper's router: every token takes its K best experts, under a bounded capacity (arXiv 2106.05974, section 2)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmoe_kernels import RouterOutput
from vmoe_kernels.common.checks import check_selected
from vmoe_kernels.common.groups import group_sum
from vmoe_torch.layers import steps
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.losses import cv_squared_by_size, gshard_from_means, size_loss
from vmoe_torch.layers.options import MeanSelectedExperts
from vmoe_torch.layers.routers.base import Routed, Router
from vmoe_torch.layers.settings import check_means, check_threshold


class TopExperts(Router):
    """Noise, the K largest gates, slots in position order or by BPR, and the paper's auxiliary losses.

    Where `gate_threshold` is set, choices whose gates are below take no slot (`Threshold` trains for that).
    """

    ROUTING = (*Router.ROUTING, "mean_selected_experts", "gate_threshold")
    takes_any_batch = True
    takes_dropless = True
    # Installed from outside by vmoe_torch.analyze: takes the router's experts (T, K) and gives others.
    choices: Callable[[Tensor], Tensor] | None = None
    # Installed from outside by vmoe_torch.calibration: takes gates (T, K) and groups, and gives `selected`.
    selection: Callable[[Tensor, Groups], Tensor] | None = None

    @torch.jit.unused
    def set_routing(
        self,
        *,
        num_selected_experts: int,
        mean_selected_experts: MeanSelectedExperts,
        gate_threshold: float | None,
        **settings: Any,
    ) -> None:
        """Checks and sets everything in `ROUTING`; on an error nothing changes."""
        num_selected_experts = check_selected(num_selected_experts, self.num_experts)
        means = check_means(mean_selected_experts, num_selected_experts)
        gate_threshold = check_threshold(gate_threshold)
        self.check_means(means, gate_threshold)
        super().set_routing(num_selected_experts=num_selected_experts, **settings)
        self.mean_selected_experts = means[0] if len(means) == 1 else means or None
        self.capacity_mean = max(means, default=None)
        self.gate_threshold = gate_threshold

    @torch.jit.unused
    def check_means(self, means: tuple[float, ...], gate_threshold: float | None) -> None:
        """Raises ValueError if the router cannot keep so many choices on average."""
        if means and gate_threshold is None:
            raise ValueError(
                f"gate_threshold must be given with mean_selected_experts={means[0]:g} unless router is 'threshold', "
                "got None: vmoe_torch.set_routing(model, mean_selected_experts=..., data=images) finds it"
            )
        if len(means) > 1:
            raise ValueError(f"mean_selected_experts must be one number unless router is 'threshold', got {means}")
        if gate_threshold is not None and self.renormalize_gates:
            raise ValueError(f"gate_threshold must be None with renormalize_gates, got {gate_threshold:g}")

    @torch.jit.unused
    def means(self) -> tuple[float, ...]:
        """`mean_selected_experts`, none or several."""
        means = self.mean_selected_experts
        return means if isinstance(means, tuple) else () if means is None else (means,)

    def capacity(self, group_tokens: int) -> int:
        """C for a group of so many tokens, in the current mode; never more than the tokens that could fill it."""
        return min(self.slots_for(group_tokens, self.num_selected_experts, self.capacity_mean), group_tokens)

    def route(self, tokens: Tensor, weight: Tensor, groups: Groups, seed: Tensor | None) -> Routed:
        noise_std = self.noise_std if self.training else 0.0
        impl = self.implementation()
        scored = steps.router(tokens, weight, self.num_selected_experts, groups.size, noise_std, seed, impl)
        experts, gates = scored.experts, scored.gates
        # Two lines, here and below: of a condition with two parts, TorchScript would compile both.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.choices is not None:
                experts = self.choices(experts)
        selected = self.selected(gates, groups)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.selection is not None:
                selected = self.selection(gates, groups)
        slots, spans, choices = self._slots(experts, gates, selected, groups, impl)
        if self.renormalize_gates:
            gates = self._renormalized(gates)
        record = {"logits": scored.logits}
        if not torch.jit.is_scripting():
            record = self._record(scored, experts, selected, groups)
        inverse: tuple[Tensor, Tensor] | None = None
        if choices is not None:
            inverse = (slots, choices)
        return Routed(gates, slots, record, spans=spans, inverse=inverse)

    def selected(self, gates: Tensor, groups: Groups) -> Tensor | None:
        """(T, K) bool, the choices that may take a slot; None is all of them."""
        return self.above(gates)

    def above(self, gates: Tensor) -> Tensor | None:
        """Those whose gates reach `gate_threshold`, if there is one; NaN does."""
        threshold = self.gate_threshold
        # Two lines, as TorchScript compiles no comparison with None.
        if threshold is not None:  # noqa: SIM102
            if threshold > 0.0:
                return ~(gates < threshold)
        return None

    def _slots(
        self, experts: Tensor, gates: Tensor, selected: Tensor | None, groups: Groups, impl: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """And, without capacities, the spans; with them, the choices of the rows where those are wanted."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.has_spans():
                wanted = experts if selected is None else torch.where(selected, experts, -1)
                slots, spans = steps.assign_dropless_slots(wanted, self.num_experts, groups, impl)
                return slots, spans, None
        by_priority, priority = self.batch_priority, self.priority
        if selected is None:
            slots, choices = steps.assign_rows(experts, gates, self.num_experts, groups, by_priority, priority, impl)
            return slots, None, choices
        # What is not selected wants an expert more, which is not there.
        wanted = torch.where(selected, experts, self.num_experts)
        experts_and_none = self.num_experts + 1
        slots, choices = steps.assign_rows(wanted, gates, experts_and_none, groups, by_priority, priority, impl)
        if choices is not None:
            choices = choices[: self.num_experts * groups.rows]
        return torch.where(selected, slots, -1), None, choices

    def _renormalized(self, gates: Tensor) -> Tensor:
        if self.training and self.num_selected_experts == 1 and gates.requires_grad:
            raise ValueError(
                "num_selected_experts must be at least 2 in training with renormalize_gates, got 1: every gate "
                "is 1, and the router learns nothing from the task"
            )
        return gates / gates.sum(-1, keepdim=True)

    @torch.jit.unused
    def _record(
        self, scored: RouterOutput, experts: Tensor, selected: Tensor | None, groups: Groups
    ) -> dict[str, Tensor]:
        # What is None was not asked of a record's reader.
        record = {name: value for name, value in scored._asdict().items() if value is not None}
        record["experts"] = experts
        if selected is not None:
            record["selected"] = selected
            if "load" in record:
                record["load"] = scored.load * _selected_share(scored.load, experts, selected, groups)
        if self.training and scored.importance.shape[0] > 0:
            sums = (scored.importance, record["load"], scored.mean_gates, scored.top1_share)
            record["loss"] = self.auxiliary_loss(*sums)
        return record

    @torch.jit.unused
    def auxiliary_loss(self, importance: Tensor, load: Tensor, mean_gates: Tensor, top1_share: Tensor) -> Tensor:
        """Weighted losses of every group, (G, E) sums and means each, averaged over groups; 0-dim.

        Losses of weight 0 are left out; the load loss needs training and noise, and that of sizes several.
        """
        balanced = []
        if self.importance_loss_weight > 0:
            balanced.append((self.importance_loss_weight, importance))
        if self.load_loss_weight > 0 and self.training and self.noise_std > 0:
            balanced.append((self.load_loss_weight, load))
        losses = []
        if balanced:
            # Together: what takes the time here is the number of operators.
            weights, sums = zip(*balanced)
            means = cv_squared_by_size(torch.stack(sums), self.sizes).mean(1)
            losses = [weight * mean for weight, mean in zip(weights, means.unbind())]
        if self.gshard_loss_weight > 0:
            losses.append(self.gshard_loss_weight * gshard_from_means(top1_share, mean_gates).mean())
        if self.size_loss_weight > 0 and len(self.sizes.groups) > 1:
            losses.append(self.size_loss_weight * size_loss(mean_gates, self.sizes).mean())
        return functools.reduce(torch.add, losses) if losses else importance.new_zeros(())


def _selected_share(load: Tensor, experts: Tensor, selected: Tensor, groups: Groups) -> Tensor:
    """(G, E) like the load: share of the choices of an expert that are selected; 1 where it has none."""
    nobody = load.new_zeros(experts.shape[0], load.shape[1])
    index = experts.long()
    chosen = group_sum(nobody.scatter(1, index, 1.0), groups.size)
    kept = group_sum(nobody.scatter(1, index, selected.to(load.dtype)), groups.size)
    return torch.where(chosen > 0, kept / chosen.clamp(min=1.0), 1.0)
