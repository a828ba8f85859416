"""The arguments of a MoE layer, described once: those of `MoeMlp` that `VMoE` and `upcycle` take, too.

For readers, type checkers and editors; tests hold the signatures and their defaults to these lists.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

AuxiliaryMode = Literal["injected", "manual"]
CapacityFactor = float | Literal["dropless"]
CapacityRounding = Literal["ceil", "round"]
DispatchDtype = Literal["float32", "bfloat16"]
GroupSize = int | Literal["batch", "image"]
Impl = Literal["auto", "triton", "reference"]
MeanSelectedExperts = float | Sequence[float] | None
Priority = Literal["max", "sum"]
RouterType = Literal["top_experts", "threshold", "expert_choice", "soft"]


class RoutingOptions(TypedDict, total=False):
    """What may change after training. For `VMoE`, each may be a dict, {name of a MoE layer: value}."""

    num_selected_experts: int
    """K, in 1..E."""
    capacity_factor: CapacityFactor
    """C = ceil(S * K * capacity_factor / E) slots per expert in a group of S tokens, then up to a multiple of
    capacity_multiple_of; 1.0 is just enough for perfectly balanced experts. "dropless" is without capacities: every
    choice is processed, so BPR and groups have no effect on the result, and no slot stays empty."""
    eval_capacity_factor: CapacityFactor | None
    """The same in eval mode; None is capacity_factor."""
    batch_priority: bool
    """Batch Priority Routing (BPR) instead of position order."""
    priority: Priority
    """For BPR: "max" or "sum" of a token's gates."""
    group_size: GroupSize
    """Images per group that is routed on its own, "batch" or "image". What remains of a batch forms one last, smaller
    group with its own capacity."""
    mean_selected_experts: MeanSelectedExperts
    """Experts per token on average, above 0 and up to K; it takes the place of K in the capacity. None is K. For router
    "threshold" also several values, of which training draws one per forward; the capacity, and eval mode, have the
    largest."""
    gate_threshold: float | None
    """In 0..1: choices whose gate is below take no slot. 0 cuts nothing. None is no threshold or, for router
    "threshold" with mean_selected_experts, the one that training found."""


class ExpertOptions(RoutingOptions, total=False):
    """What a layer takes beside the number of its experts and the scaling of its gates."""

    expert_hidden: Sequence[int | float] | int | float | None
    """Hidden width of each of the E experts, or one for all: an int is a number of units, a float a share of the
    layer's H (a model's mlp_ratio * embed_dim), so (1.0, 1.0, 0.5, 0.0) is two whole experts, a half one and a null
    expert, which gives 0. Each is 0, H or a multiple of 128 (of 16 where H is at most 1024). None, or H, is the layer
    of equal experts. The importance and load losses balance the experts of each size among themselves."""
    shared_expert_hidden: int | float | None
    """Hidden width of an MLP that every token passes beside the experts, whatever the router; its output is added to
    theirs. An int is a number of units, a float a share of the layer's H; None or 0 is none. An option without a
    claim: known from ViMoE (arXiv 2410.15732), its use to V-MoE has not been measured."""
    capacity_rounding: CapacityRounding
    """Up ("ceil"), or to the nearest, half to even ("round")."""
    capacity_multiple_of: int | None
    """1 (or None) leaves the capacity as it is."""
    noise_std: float | None
    """Router noise in training, N(0, (noise_std / E)^2) per logit; of a soft router N(0, noise_std^2). None is 1.0, or
    0.0 for a soft router."""
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
    router_z_loss_weight: float
    """Weight of the router z-loss, the mean over tokens of logsumexp(logits)^2 without noise; not for a soft router. An
    option without a claim: known from language models, its use to V-MoE has not been measured."""
    auxiliary_mode: AuxiliaryMode
    """The gradient reaches the router by itself ("injected"), or you add `vmoe_torch.auxiliary_loss(model)` to the loss
    ("manual")."""
    router: RouterType
    """A word of `vmoe_torch.layers.ROUTERS`: tokens choose experts, as many each, or ("threshold") as many as
    their gates above a threshold; or experts choose tokens; or ("soft") every slot of an expert is a mixture of all
    tokens of an image."""
    slots_per_expert: int | None
    """P, slots of each expert of a soft router; None or 0 is round(S * capacity_factor / E) for the S tokens of an
    image that the model, or a layer's first forward, has."""
    dispatch_dtype: DispatchDtype | None
    """None or "float32" for the layer's own, or "bfloat16" to round what goes into and comes out of the experts, as the
    released models were trained."""
    impl: Impl
    """Triton on a GPU that can launch it and loops on a CPU ("auto"), "triton", or the eager "reference"."""


class MoeOptions(ExpertOptions, total=False):
    """All of them."""

    num_experts: int
    """E."""
    renormalize_gates: bool
    """Whether the K gates of a token are scaled to sum to 1, as some upcycled models want it; the original does not.
    With K=1 every gate is 1, and the router would learn nothing from the task: evaluated, but not trained."""
