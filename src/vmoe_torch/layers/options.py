"""The arguments of a MoE layer, described once: those of `MoeMlp` that `VMoE` and `upcycle` take, too.

For readers, type checkers and editors; tests hold the signatures and their defaults to these lists.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

AuxiliaryMode = Literal["injected", "manual"]
CapacityRounding = Literal["ceil", "round"]
DispatchDtype = Literal["float32", "bfloat16"]
GroupSize = int | Literal["batch", "image"]
Impl = Literal["auto", "triton", "reference"]
Priority = Literal["max", "sum"]
RouterType = Literal["top_experts", "expert_choice"]


class RoutingOptions(TypedDict, total=False):
    """What may change after training. For `VMoE`, each may be a dict, {name of a MoE layer: value}."""

    num_selected_experts: int
    """K, in 1..E."""
    capacity_factor: float
    """C = ceil(S * K * capacity_factor / E) slots per expert in a group of S tokens, then up to a multiple of
    capacity_multiple_of; 1.0 is just enough for perfectly balanced experts."""
    eval_capacity_factor: float | None
    """The same in eval mode; None is capacity_factor."""
    batch_priority: bool
    """Batch Priority Routing (BPR) instead of position order."""
    priority: Priority
    """For BPR: "max" or "sum" of a token's gates."""
    group_size: GroupSize
    """Images per group that is routed on its own, "batch" or "image". What remains of a batch forms one last, smaller
    group with its own capacity."""


class ExpertOptions(RoutingOptions, total=False):
    """What a layer takes beside the number of its experts and the scaling of its gates."""

    expert_hidden: Sequence[int | float] | None
    """Hidden width of each of the E experts: an int is a number of units, a float a share of the layer's H (a model's
    mlp_ratio * embed_dim), so (1.0, 1.0, 0.5, 0.0) is two whole experts, a half one and a null expert, which gives 0.
    Each is 0, H or a multiple of 128 (of 16 where H is at most 1024). None, or H for all, is the layer of equal
    experts. The importance and load losses balance the experts of each size among themselves."""
    capacity_rounding: CapacityRounding
    """Up ("ceil"), or to the nearest, half to even ("round")."""
    capacity_multiple_of: int | None
    """1 (or None) leaves the capacity as it is."""
    noise_std: float
    """Router noise in training, N(0, (noise_std / E)^2) per logit."""
    expert_drop: float | None
    """Dropout inside the experts only; None is the layer's `drop` (a model's proj_drop_rate). Every expert draws a mask
    of its own; the original's experts, unless its split_rngs says otherwise, share one."""
    importance_loss_weight: float
    """Weight of the importance loss."""
    load_loss_weight: float
    """Weight of the load loss (training with noise)."""
    gshard_loss_weight: float
    """Weight of the GShard loss."""
    size_loss_weight: float
    """Weight of the sum over experts of mean gate * H_e / max(H), which draws tokens to the narrow experts; without
    effect where all are of one size."""
    auxiliary_mode: AuxiliaryMode
    """The gradient reaches the router by itself ("injected"), or you add `vmoe_torch.auxiliary_loss(model)` to the loss
    ("manual")."""
    router: RouterType
    """A word of `vmoe_torch.layers.ROUTERS`: tokens choose experts, or experts tokens."""
    dispatch_dtype: DispatchDtype | None
    """None or "float32" for the layer's own, or "bfloat16" to round what goes into and comes out of the experts, as the
    released models were trained."""
    impl: Impl
    """Triton on a GPU and loops on a CPU ("auto"), "triton", or the eager "reference"."""


class MoeOptions(ExpertOptions, total=False):
    """All of them."""

    num_experts: int
    """E."""
    renormalize_gates: bool
    """Whether the K gates of a token are scaled to sum to 1, as some upcycled models want it; the original does not.
    With K=1 every gate is 1, and the router would learn nothing from the task: evaluated, but not trained."""
