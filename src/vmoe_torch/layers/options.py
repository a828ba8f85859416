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
    capacity_factor: float
    eval_capacity_factor: float | None
    batch_priority: bool
    priority: Priority
    group_size: GroupSize


class ExpertOptions(RoutingOptions, total=False):
    """What a layer takes beside the number of its experts and the scaling of its gates: see `MoeMlp`."""

    capacity_rounding: CapacityRounding
    capacity_multiple_of: int | None
    noise_std: float
    expert_drop: float | None
    importance_loss_weight: float
    load_loss_weight: float
    gshard_loss_weight: float
    auxiliary_mode: AuxiliaryMode
    router: RouterType
    dispatch_dtype: DispatchDtype | None
    impl: Impl
