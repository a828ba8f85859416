"""Tensors in, tensors out: the four steps of a sparse MoE layer and the call that chains them.

One legend: B images, L tokens per image, D width, H hidden width of an expert, G groups, S tokens per group,
E experts, K experts selected per token, C slots per expert and group, T = B * L tokens.
"""

from vmoe_kernels.common.groups import compute_capacity, num_groups, rows_per_expert
from vmoe_kernels.experts.dropless_mlp_op import dropless_mlp, dropless_mlp_reference
from vmoe_kernels.experts.expert_mlp_op import expert_mlp, expert_mlp_reference
from vmoe_kernels.experts.moe_mlp_op import moe_mlp, moe_mlp_reference
from vmoe_kernels.routing.assigned_rows import AssignedRows, assign_rows
from vmoe_kernels.routing.chain import Routing, route, route_reference
from vmoe_kernels.routing.dropless_slots import (
    DroplessSlots,
    assign_dropless_slots,
    assign_dropless_slots_reference,
)
from vmoe_kernels.routing.router_op import RouterOutput, router, router_reference
from vmoe_kernels.routing.slots import assign_slots, assign_slots_reference
from vmoe_kernels.rows.combine_op import combine, combine_reference
from vmoe_kernels.rows.dispatch_op import dispatch, dispatch_reference

__all__ = [
    "AssignedRows",
    "DroplessSlots",
    "RouterOutput",
    "Routing",
    "assign_dropless_slots",
    "assign_dropless_slots_reference",
    "assign_rows",
    "assign_slots",
    "assign_slots_reference",
    "combine",
    "combine_reference",
    "compute_capacity",
    "dispatch",
    "dispatch_reference",
    "dropless_mlp",
    "dropless_mlp_reference",
    "expert_mlp",
    "expert_mlp_reference",
    "moe_mlp",
    "moe_mlp_reference",
    "num_groups",
    "route",
    "route_reference",
    "router",
    "router_reference",
    "rows_per_expert",
]
