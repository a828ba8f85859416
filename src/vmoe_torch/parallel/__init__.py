"""Expert parallelism, applied to a finished model from outside: DeviceMesh, DTensor, FSDP2, all-to-all."""

from vmoe_torch.parallel.apply import parallelize, parameter_groups
from vmoe_torch.parallel.averages import share_thresholds
from vmoe_torch.parallel.checkpoint import (
    ShardedCheckpoints,
    export_safetensors,
    full_state_dict,
    load_checkpoint,
    part_of,
)
from vmoe_torch.parallel.clip import clip_grad_norm
from vmoe_torch.parallel.exchange import ExpertExchange
from vmoe_torch.parallel.mesh import build_mesh
from vmoe_torch.parallel.meta import materialize
from vmoe_torch.parallel.ranks.agreement import on_first, require_same
from vmoe_torch.parallel.ranks.failures import RankError, shared_errors
from vmoe_torch.parallel.ranks.meeting import join, wait_for_all
from vmoe_torch.planning import GPUS, PlannedRun, PlannedStep, changes_that_fit, describe, plan

__all__ = [
    "GPUS",
    "ExpertExchange",
    "PlannedRun",
    "PlannedStep",
    "RankError",
    "ShardedCheckpoints",
    "build_mesh",
    "changes_that_fit",
    "clip_grad_norm",
    "describe",
    "export_safetensors",
    "full_state_dict",
    "join",
    "load_checkpoint",
    "materialize",
    "on_first",
    "parallelize",
    "parameter_groups",
    "part_of",
    "plan",
    "require_same",
    "share_thresholds",
    "shared_errors",
    "wait_for_all",
]
