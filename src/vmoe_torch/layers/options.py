"""The words that options take, and the options that are passed on to every `MoeMlp`, for type checkers and editors."""

from typing import Literal, TypedDict

AuxiliaryMode = Literal["injected", "manual"]
CapacityRounding = Literal["ceil", "round"]
DispatchDtype = Literal["float32", "bfloat16"]
GroupSize = int | Literal["batch", "image"]
Impl = Literal["auto", "triton", "reference"]
Priority = Literal["max", "sum"]
RouterType = Literal["top_experts", "expert_choice"]


class RoutingOptions(TypedDict, total=False):
    """What may change after training: see `MoeMlp`."""

    num_selected_experts: int
    """K, in 1..E."""
    capacity_factor: float
    """Slots per expert, as a multiple of the balanced load, S * K / E; above 0."""
    eval_capacity_factor: float | None
    """The same in eval mode; None is capacity_factor."""
    batch_priority: bool
    """Batch Priority Routing (BPR) instead of position order."""
    priority: Priority
    """Of BPR: the "max" or "sum" of a token's gates."""
    group_size: GroupSize
    """Images per group that is routed on its own, at least 1, "batch" or "image"."""


class ExpertOptions(RoutingOptions, total=False):
    """What a layer takes beside the number of its experts and the scaling of its gates: see `MoeMlp`."""

    capacity_rounding: CapacityRounding
    """Of the slots per expert: "ceil" or "round"."""
    capacity_multiple_of: int | None
    """Capacity goes up to a multiple of this; None, 0 and 1 leave it."""
    noise_std: float
    """Router noise in training, at least 0; each logit gets N(0, (noise_std / E)^2)."""
    expert_drop: float | None
    """Dropout inside the experts, in [0, 1); None is that of the MLPs."""
    importance_loss_weight: float
    """Weight of the importance loss, at least 0."""
    load_loss_weight: float
    """Weight of the load loss (training with noise), at least 0."""
    gshard_loss_weight: float
    """Weight of the GShard loss, at least 0."""
    auxiliary_mode: AuxiliaryMode
    """Either "injected" (the gradient reaches the router by itself) or "manual" (add `vmoe_torch.auxiliary_loss(model)`
    to the loss)."""
    router: RouterType
    """Either "top_experts" or "expert_choice"."""
    dispatch_dtype: DispatchDtype | None
    """With "bfloat16", what goes into and comes out of the experts is rounded; not with None or "float32"."""
    impl: Impl
    """One of "auto", "triton" and "reference"."""
