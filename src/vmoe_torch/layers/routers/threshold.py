"""Threshold routing: a token has as many experts, up to K, as it has gates above the layer's threshold.

The authors of V-MoE named it "conditional variable-length routing" and left it open. A choice below the threshold
takes no slot, as if K more experts of that constant gate stood beside the E, each of which gives 0 (AdaMoE, arXiv
2406.13233). The thresholds follow the gates in training, as in Expert Race (arXiv 2503.16057) and DiffMoE (arXiv
2503.14487), which select over a whole batch; several means in one training are from arXiv 2509.26520.
"""

from typing import Any

import torch
from torch import Tensor

from vmoe_kernels.common.transforms import transformed
from vmoe_torch.layers import thresholds
from vmoe_torch.layers.groups import Groups
from vmoe_torch.layers.routers.top_experts import TopExperts

# Of a table of thresholds that is left after each forward in training.
DECAY = 0.99


class Threshold(TopExperts):
    """`TopExperts` of which a token keeps `mean_selected_experts` on average: easy patches fewer, hard ones more.

    In training exactly the round(S * mean) largest gates of a group's S * K choices are kept, ties by token and rank,
    whatever the images. In eval mode a choice is kept if its gate reaches the threshold, so that images do not
    depend on each other: `gate_threshold` or, where that is None, what training found for this mean. No gate is
    scaled, Batch Priority Routing goes by the largest gate as ever, and a token that keeps no choice gets 0.

    What training finds is in `thresholds`, a buffer of the state dict, float32 whatever the model: moving averages of
    the thresholds for 0.01 to K experts per token, so another mean can be set without data (one below 0.01 has the
    threshold of 0.01). They are those of the K of the training: fewer choices than that keep less than the mean that is
    asked for. What nothing was found for is 0, which cuts nothing: weights that come without it, and means
    above the K of the training. `vmoe_torch.set_routing(..., data=images)` finds thresholds for those.

    Without a mean and a threshold it is `TopExperts`, bit for bit, and finds the thresholds as it trains.
    """

    def __init__(self, dim: int, num_experts: int, *args: Any, **options: Any):
        super().__init__(dim, num_experts, *args, **options)
        if self.renormalize_gates:
            raise ValueError("renormalize_gates must be False unless router is 'top_experts', got router='threshold'")
        # In the dtype of the gates.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("thresholds", torch.zeros(thresholds.POINTS, device=self.weight.device, dtype=dtype))

    @torch.jit.unused
    def check_means(self, means: tuple[float, ...], gate_threshold: float | None) -> None:
        """Any number of means will do, with and without a threshold for eval mode; the largest is in the table."""
        most = thresholds.POINTS // thresholds.POINTS_PER_EXPERT
        if max(means, default=0.0) > most:
            raise ValueError(f"mean_selected_experts must be at most {most} with router='threshold', got {max(means)}")

    @torch.jit.unused
    def lacks_threshold(self) -> bool:
        """Whether eval mode would go by a threshold that no training has found, and cut nothing."""
        mean = self.capacity_mean
        if mean is None or self.gate_threshold is not None or mean >= self.num_selected_experts:
            return False
        return not self.thresholds.is_meta and float(self._threshold()) == 0.0

    @torch.jit.unused
    def set_routing(self, **settings: Any) -> None:
        super().set_routing(**settings)
        # Of the mean in the table of thresholds.
        self.place = 0.0 if self.capacity_mean is None else thresholds.place_of(self.capacity_mean)

    def selected(self, gates: Tensor, groups: Groups) -> Tensor | None:
        mean = self.capacity_mean
        if self.training:
            if torch.jit.is_scripting():
                return None
            return self._selected_in_training(gates, groups)
        # Two lines, as TorchScript compiles no comparison with None.
        if self.gate_threshold is None and mean is not None:  # noqa: SIM102
            if mean < self.num_selected_experts:
                return ~(gates < self._threshold())
        return self.above(gates)

    @torch.jit.unused
    def _selected_in_training(self, gates: Tensor, groups: Groups) -> Tensor | None:
        places, table = thresholds.ranked(gates, groups.size)
        if gates.shape[0] > 0:
            self._learn(table)
        means = self.means()
        if not means:
            return self.above(gates)
        draw = torch.randint(len(means), (), device=gates.device) if len(means) > 1 else None
        return thresholds.largest(places, groups.size, means, draw)

    @torch.jit.unused
    def _learn(self, table: Tensor) -> None:
        """Moves the thresholds to those of a forward; the first one sets them."""
        if not torch.compiler.is_compiling() and torch._C._current_autograd_node() is not None:
            # Recomputed in a backward: the forward itself has been here.
            return
        if transformed():
            return
        table = table.to(self.thresholds.dtype)
        # What nothing was found for yet.
        moved = torch.where(self.thresholds == 0, table, torch.lerp(table, self.thresholds, DECAY))
        self.thresholds.copy_(torch.where(table.isfinite().all(), moved, self.thresholds))

    def _threshold(self) -> Tensor:
        """0-dim, that of the mean; between two points of the table in proportion."""
        low = int(self.place)
        if self.place == low:
            return self.thresholds[low]
        return torch.lerp(self.thresholds[low], self.thresholds[low + 1], self.place - low)

    def _apply(self, *args: Any, **options: Any) -> "Threshold":
        before = self.thresholds
        super()._apply(*args, **options)
        # A moving average of 16 bits stands still.
        if torch.finfo(self.thresholds.dtype).bits < 32:
            self.thresholds = before.to(self.thresholds.device)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        # Before there is a buffer, the weight is initialised by the base class.
        if "thresholds" in self._buffers:
            self.thresholds.zero_()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        # Weights of top experts have none: all of their choices count.
        name = f"{prefix}thresholds"
        if name in missing_keys and f"{prefix}weight" in state_dict:
            missing_keys.remove(name)
            self.thresholds.zero_()
