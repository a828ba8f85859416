"""The paper's router: every token takes its K best experts, under a bounded capacity (arXiv 2106.05974, section 2)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmoe_kernels import RouterOutput
from vmoe_torch.layers import steps
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.losses import cv_squared_by_size, gshard_from_means, size_loss
from vmoe_torch.layers.routers.base import Routed, Router


class TopExperts(Router):
    """Noise, the K largest gates, slots in position order or by BPR, and the paper's auxiliary losses."""

    takes_any_batch = True
    # Installed from outside by vmoe_torch.analyze: takes the router's experts (T, K) and gives others.
    choices: Callable[[Tensor], Tensor] | None = None

    def capacity(self, group_tokens: int) -> int:
        """C for a group of so many tokens, in the current mode; never more than the tokens that could fill it."""
        return min(self.slots_for(group_tokens, self.num_selected_experts), group_tokens)

    def route(self, tokens: Tensor, weight: Tensor, groups: Groups, seed: Tensor | None) -> Routed:
        noise_std = self.noise_std if self.training else 0.0
        impl = self.implementation()
        scored = steps.router(tokens, weight, self.num_selected_experts, groups.size, noise_std, seed, impl)
        experts, gates = scored.experts, scored.gates
        # Two lines, here and below: of a condition with two parts, TorchScript would compile both.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.choices is not None:
                experts = self.choices(experts)
        slots = steps.assign_slots(experts, gates, self.num_experts, groups, self.batch_priority, self.priority, impl)
        if self.renormalize_gates:
            gates = self._renormalized(gates)
        record = {"logits": scored.logits}
        if not torch.jit.is_scripting():
            record = self._record(scored, experts)
        return Routed(gates, slots, record)

    def _renormalized(self, gates: Tensor) -> Tensor:
        if self.training and self.num_selected_experts == 1 and gates.requires_grad:
            raise ValueError(
                "num_selected_experts must be at least 2 in training with renormalize_gates, got 1: every gate "
                "is 1, and the router learns nothing from the task"
            )
        return gates / gates.sum(-1, keepdim=True)

    @torch.jit.unused
    def _record(self, scored: RouterOutput, experts: Tensor) -> dict[str, Tensor]:
        # What is None was not asked of a record's reader.
        record = {name: value for name, value in scored._asdict().items() if value is not None}
        record["experts"] = experts
        if self.training and scored.importance.shape[0] > 0:
            sums = (scored.importance, scored.load, scored.mean_gates, scored.top1_share)
            record["loss"] = self.auxiliary_loss(*sums)
        return record

    @torch.jit.unused
    def auxiliary_loss(self, importance: Tensor, load: Tensor, mean_gates: Tensor, top1_share: Tensor) -> Tensor:
        """Weighted losses of every group, (G, E) sums and means each, averaged over groups; 0-dim.

        Losses of weight 0 are left out; the load loss needs training and noise, and that of sizes several.
        """
        loss = importance.new_zeros(())
        if self.importance_loss_weight > 0:
            loss = loss + self.importance_loss_weight * cv_squared_by_size(importance, self.sizes).mean()
        if self.load_loss_weight > 0 and self.training and self.noise_std > 0:
            loss = loss + self.load_loss_weight * cv_squared_by_size(load, self.sizes).mean()
        if self.gshard_loss_weight > 0:
            loss = loss + self.gshard_loss_weight * gshard_from_means(top1_share, mean_gates).mean()
        if self.size_loss_weight > 0 and len(self.sizes.groups) > 1:
            loss = loss + self.size_loss_weight * size_loss(mean_gates, self.sizes).mean()
        return loss
