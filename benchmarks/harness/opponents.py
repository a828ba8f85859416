"""The MoE layer as one would write it without this project: each takes the same slots and gates and returns the same y.

Dims: T tokens, K choices, D width, H hidden width, E experts, R rows per expert, N = E * R, G groups of S, C slots.
"""

import importlib.util
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import vmoe_kernels as kernels
from benchmarks.harness.cases import Case, Layer
from vmoe_kernels.common.impl import has_kernels
from vmoe_kernels.rows.dispatch_op import choice_of_row

Compiler = Callable[[Callable], Callable]


def mlp_variants(case: Case, compiler: Compiler) -> dict[str, Callable[..., Tensor]]:
    """Dispatch, expert MLP and combine, by name; arguments as `vmoe_kernels.moe_mlp` names them."""

    def ours(x, slots, gates, **weights) -> Tensor:
        return kernels.moe_mlp(x, slots, gates, **weights, rows_per_expert=case.rows)

    def eager(x, slots, gates, **weights) -> Tensor:
        return kernels.moe_mlp_reference(x, slots, gates, **weights, rows_per_expert=case.rows)

    variants = {
        "ours": ours,
        "eager": eager,
        "bmm": bmm(case, compiler),
        "compile": compiler(eager),
        "one-hot einsum": one_hot(case),
    }
    if hasattr(F, "grouped_mm"):
        variants["grouped_mm"] = grouped_mm(case)
    return variants


def expert_variants(case: Case, compiler: Compiler) -> dict[str, Callable[..., Tensor]]:
    """The expert MLP alone, on a dispatched buffer x (E, R, D)."""
    epilogue = compiler(_bias_gelu)
    add_bias = compiler(_bias)

    def with_bmm(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
        hidden = epilogue(torch.bmm(x, fc1_weight.mT), fc1_bias)
        return add_bias(torch.bmm(hidden, fc2_weight.mT), fc2_bias)

    variants = {
        "ours": kernels.expert_mlp,
        "eager": kernels.expert_mlp_reference,
        "bmm": with_bmm,
        "compile": compiler(kernels.expert_mlp_reference),
    }
    if hasattr(F, "grouped_mm"):
        ends = _ends(case)

        def with_grouped_mm(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
            hidden = F.grouped_mm(x.flatten(0, 1), fc1_weight.mT, offs=ends(x)).view(*x.shape[:2], -1)
            hidden = _bias_gelu(hidden, fc1_bias)
            out = F.grouped_mm(hidden.flatten(0, 1), fc2_weight.mT, offs=ends(x)).view(*x.shape[:2], -1)
            return _bias(out, fc2_bias)

        variants["grouped_mm"] = with_grouped_mm
    return variants


def bmm(case: Case, compiler: Compiler) -> Callable[..., Tensor]:
    """Gather, cuBLAS batched products, and a compiled bias + GELU between and bias + weighted sum behind them."""
    index, epilogue, finish = compiler(_row_tokens), compiler(_bias_gelu), compiler(_gather_sum)

    def call(x, slots, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
        buffer = x.index_select(0, index(slots, case.num_rows)).view(case.num_experts, case.rows, -1)
        hidden = epilogue(torch.bmm(buffer, fc1_weight.mT), fc1_bias)
        return finish(torch.bmm(hidden, fc2_weight.mT), fc2_bias, slots, gates)

    return call


def grouped_mm(case: Case) -> Callable[..., Tensor]:
    """The same with F.grouped_mm, which takes no bias, and eager PyTorch around it."""
    ends = _ends(case)

    def call(x, slots, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
        buffer = x.index_select(0, _row_tokens(slots, case.num_rows))
        hidden = F.grouped_mm(buffer, fc1_weight.mT, offs=ends(x)).view(case.num_experts, case.rows, -1)
        hidden = _bias_gelu(hidden, fc1_bias)
        out = F.grouped_mm(hidden.flatten(0, 1), fc2_weight.mT, offs=ends(x))
        return _gather_sum(out.view(case.num_experts, case.rows, -1), fc2_bias, slots, gates)

    return call


def one_hot(case: Case) -> Callable[..., Tensor]:
    """The original's formulation: dispatch and combine are products with a (G, S, E * C) tensor."""
    groups, capacity = case.num_tokens // case.group_size, case.capacity

    def call(x, slots, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
        group = torch.arange(groups, device=x.device).view(-1, 1, 1)
        row = slots.view(groups, case.group_size, -1).long()
        place = row // case.rows * capacity + row % case.rows - group * capacity
        kept = torch.where(row < 0, 0.0, gates.view_as(row))
        place = torch.where(row < 0, 0, place)
        empty = x.new_zeros(groups, case.group_size, case.num_experts * capacity)
        mask = empty.scatter_add(2, place, (row >= 0).to(x.dtype))
        weights = empty.scatter_add(2, place, kept.to(x.dtype))
        buffer = torch.einsum("gsn,gsd->gnd", mask, x.view(groups, case.group_size, -1))
        buffer = buffer.view(groups, case.num_experts, capacity, -1).transpose(0, 1).flatten(1, 2)
        out = kernels.expert_mlp_reference(buffer, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        out = out.view(case.num_experts, groups, capacity, -1).transpose(0, 1).reshape(groups, -1, x.shape[1])
        return torch.einsum("gsn,gnd->gsd", weights, out).reshape(x.shape)

    return call


def layer_variants(
    case: Case, compiler: Compiler, mlps: Mapping[str, Callable[..., Tensor]]
) -> dict[str, Callable[..., Tensor]]:
    """Routing and one of `mlp_variants` each; opponents route by the compiled eager reference."""
    selected = {"num_selected_experts": case.num_selected, "group_size": case.group_size}
    places = {"capacity": case.capacity, "last_capacity": case.capacity, "batch_priority": True}

    def route_eager(x, router) -> dict[str, Tensor]:
        routing = kernels.route_reference(x, router, **selected, **places)
        return {"slots": routing.slots, "gates": routing.gates}

    def route_ours(x, router) -> dict[str, Tensor]:
        """As `MoeMlp` does: on a GPU the choices of the rows come with the slots."""
        scored = kernels.router(x, router, **selected)
        choices = scored.experts, scored.gates
        settings = {"num_experts": case.num_experts, "group_size": case.group_size, **places}
        if has_kernels(x.device):
            return {**kernels.assign_rows(*choices, **settings)._asdict(), "gates": scored.gates}
        return {"slots": kernels.assign_slots(*choices, **settings), "gates": scored.gates}

    route_compiled = compiler(route_eager)
    routes = {"ours": route_ours, "eager": route_eager}

    def chain(route, mlp) -> Callable[..., Tensor]:
        def call(x, router, **weights) -> Tensor:
            return mlp(x=x, **route(x, router), **weights)

        return call

    return {name: chain(routes.get(name, route_compiled), mlp) for name, mlp in mlps.items()}


def scattermoe(layer: Layer) -> tuple[Callable[[], Tensor], Tensor] | None:
    """ScatterMoE's MLP, where installed, and what it must return: it has neither biases nor a capacity.

    Returns:
        A call, and (T, D) by the eager reference; None where the package is missing.
    """
    if importlib.util.find_spec("scattermoe") is None:
        return None
    from scattermoe.mlp import MLP

    case, routing = layer.case, layer.routing
    mlp = MLP(
        input_size=case.width,
        hidden_size=case.hidden,
        num_experts=case.num_experts,
        top_k=case.num_selected,
        activation=torch.nn.GELU(approximate="tanh"),
    ).to(layer.x.device, layer.x.dtype)
    with torch.no_grad():
        mlp.experts.weight.copy_(layer.fc1_weight)
        mlp.output_experts.weight.copy_(layer.fc2_weight)
        # With as many slots as tokens nothing is dropped.
        everyone = kernels.assign_slots_reference(
            routing.experts,
            routing.gates,
            num_experts=case.num_experts,
            group_size=case.num_tokens,
            capacity=case.num_tokens,
            last_capacity=case.num_tokens,
        )
        want = kernels.moe_mlp_reference(
            layer.x,
            everyone,
            routing.gates,
            layer.fc1_weight,
            None,
            layer.fc2_weight,
            None,
            rows_per_expert=case.num_tokens,
        )

    @torch.no_grad()
    def call() -> Tensor:
        return mlp(layer.x, routing.gates.to(layer.x.dtype), routing.experts.long())

    return call, want


def _row_tokens(slots: Tensor, num_rows: int) -> Tensor:
    """(N,) token of each row; an empty row, which nothing reads, takes token 0."""
    return (choice_of_row(slots, num_rows) // slots.shape[1]).clamp(min=0)


def _bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(hidden + bias.unsqueeze(1), approximate="tanh")


def _bias(out: Tensor, bias: Tensor) -> Tensor:
    return out + bias.unsqueeze(1)


def _gather_sum(out: Tensor, bias: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """(E, R, D) expert outputs without their bias (E, D) to (T, D)."""
    rows = slots.clamp(min=0).long()
    values = out.flatten(0, 1)[rows].to(gates.dtype) + bias[rows // out.shape[1]].to(gates.dtype)
    return (values * torch.where(slots < 0, 0.0, gates).unsqueeze(-1)).sum(1).to(out.dtype)


def _ends(case: Case) -> Callable[[Tensor], Tensor]:
    """End row of every expert's part of the buffer, int32, made once."""
    made: dict[torch.device, Tensor] = {}

    def ends(x: Tensor) -> Tensor:
        if x.device not in made:
            steps = torch.arange(1, case.num_experts + 1, device=x.device, dtype=torch.int32)
            made[x.device] = steps * case.rows
        return made[x.device]

    return ends
