"""Every op of vmoe_kernels on a device, against its eager twin: outputs and gradients, in each dtype.

A result may be twice as far from the twin in float64 as the twin in the same dtype is; some units in the last place are
always allowed (`vmoe_kernels.testing.compare`). Slots are integers, and must keep the twin's choices.

Dims: T tokens, K selected, E experts, C slots per expert, D width, H hidden width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vmoe_kernels as kernels
from vmoe_kernels.common.groups import choices_of_rows
from vmoe_kernels.common.impl import ROW_TILE
from vmoe_kernels.testing import Comparison, compare_with_eager, make_experts, make_routed, slots_fault
from vmoe_torch.doctor import problems
from vmoe_torch.doctor.problems import Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Units in the last place that are always allowed. In float64 the twin itself is the truth and has no error to compare
# with. The router adds functions of its noise, whose own units are larger than those of its smallest outputs.
ULPS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2, torch.float64: 64}
ROUTER_FACTOR = 2


@dataclass(frozen=True)
class Sizes:
    """Of one call of each op."""

    tokens: int
    """T."""
    selected: int
    """K."""
    experts: int
    """E."""
    capacity: int
    """C, of one group of all tokens."""
    width: int
    """D."""
    hidden: int
    """H."""

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.width} H={self.hidden} E={self.experts} K={self.selected} C={self.capacity}"


# Sizes that no tile divides; then two blocks of rows for a CPU's cache, and on a GPU four images through V-MoE-B and 64
# through two of its experts, which are work enough for the widest tiles of an H100 or B200.
ODD = Sizes(13, 3, 5, 4, 20, 24)
SIZES = {
    "cpu": (ODD, Sizes(400, 2, 2, 400, 16, 3072)),
    "cuda": (ODD, Sizes(788, 2, 8, 208, 768, 3072), Sizes(12_608, 1, 2, 6400, 768, 3072)),
}


@dataclass(frozen=True)
class Check:
    """One op in one dtype."""

    op: str
    """Name in vmoe_kernels."""
    dtype: str
    """Of the tokens and weights."""
    status: str
    """"ok", "fails" or "not run"."""
    results: dict[str, dict[str, Comparison]] = field(default_factory=dict)
    """Sizes, in words, to the comparison of each output and gradient by name."""
    problem: Problem | None = None
    """What is wrong where it fails."""

    @property
    def share(self) -> float | None:
        """The largest share of an allowed error that was found; None where nothing was compared."""
        found = [each for one in self.results.values() for each in one.values()]
        shares = [each.error / each.allowed if each.allowed else 0.0 for each in found]
        return max(shares, default=None)


def check_all(
    device: torch.device,
    sizes: tuple[Sizes, ...],
    progress: Callable = iter,
    begin: Callable[[str], None] = lambda what: None,
) -> Iterator[Check]:
    """Yields the check of every op in every dtype; one that fails costs the others nothing but a GPU's context.

    Args:
        device: where the ops run.
        sizes: of their calls.
        progress: wraps the list of what is to be done.
        begin: told what comes next: a kernel may take the process with it.
    """
    lost = False
    for op, dtype in progress([(op, dtype) for op in OPS for dtype in DTYPES]):
        if lost:
            yield Check(op, dtype, "not run")
            continue
        begin(f"{op} in {dtype}")
        check = check_op(op, dtype, device, sizes)
        yield check
        lost = check.problem is not None and _is_lost(device)


def check_op(op: str, dtype: str, device: torch.device, sizes: tuple[Sizes, ...]) -> Check:
    """Runs one op in one dtype at all sizes."""
    results: dict[str, dict[str, Comparison]] = {}
    try:
        for each in sizes:
            results[str(each)] = OPS[op](DTYPES[dtype], device, each)
            if device.type == "cuda":
                # What a kernel did wrong shows here, not in the next op.
                torch.cuda.synchronize(device)
    except Exception as error:  # Any fault of an op is what is looked for.
        return Check(op, dtype, "fails", results, problems.of_error(f"{op} in {dtype}", error, _advice(device)))
    faults = [(where, one.fault) for where, found in results.items() for one in found.values() if one.fault is not None]
    if faults:
        where, why = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Check(op, dtype, "fails", results, Problem(f"{op} in {dtype}", f"{why}{more}, {where}", _advice(device)))
    return Check(op, dtype, "ok", results)


def _advice(device: torch.device) -> str:
    return problems.UPDATE if device.type == "cuda" else problems.REFERENCE


def _is_lost(device: torch.device) -> bool:
    """Whether an error has cost the process its GPU: after an access out of bounds, nothing runs on it any more."""
    if device.type != "cuda":
        return False
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def _router(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    make = torch.Generator().manual_seed(3)
    x = torch.randn(sizes.tokens, sizes.width, generator=make).to(device, dtype)
    weight = (torch.randn(sizes.experts, sizes.width, generator=make) * sizes.width**-0.5).to(device, dtype)
    options = {"num_selected_experts": sizes.selected, "group_size": -(-sizes.tokens // 2), "noise_std": 1.0}
    options["seed"] = torch.tensor(2**41 + 77, device=device)
    found = {}
    for name in ("gates", "logits", "importance", "load", "mean_gates"):

        def output(router: Callable, x: Tensor, weight: Tensor, name: str = name) -> Tensor:
            return getattr(router(x, weight, **options), name)

        both = (partial(output, router) for router in (kernels.router, kernels.router_reference))
        compared = compare_with_eager(*both, {"x": x, "weight": weight}, ulps=ROUTER_FACTOR * ULPS[dtype])
        found |= {name if part == "output" else f"{part} of {name}": each for part, each in compared.items()}
    return found


def _assign_slots(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    make = torch.Generator().manual_seed(4)
    gates = torch.randn(sizes.tokens, sizes.experts, generator=make).softmax(-1)
    gates, experts = gates.to(device, dtype).sort(dim=-1, descending=True, stable=True)
    gates, experts = gates[:, : sizes.selected].contiguous(), experts[:, : sizes.selected].to(torch.int32).contiguous()
    places = {"group_size": -(-sizes.tokens // 2), "capacity": max(sizes.capacity // 4, 1)}
    places["last_capacity"] = places["capacity"]
    found = {}
    for name, by_priority in (("vanilla", False), ("batch priority", True)):
        options = {**places, "num_experts": sizes.experts, "batch_priority": by_priority}
        slots = kernels.assign_slots(experts, gates, **options)
        fault = slots_fault(slots, kernels.assign_slots_reference(experts, gates, **options), **places)
        fault = fault or _inverse_fault(*kernels.assign_rows(experts, gates, **options))
        found[name] = Comparison(0.0 if fault is None else torch.inf, 0.0, 0.0, fault)
    return found


def _inverse_fault(slots: Tensor, choices: Tensor) -> str | None:
    """What is wrong with the choices that rows are said to hold."""
    wrong = int((choices_of_rows(slots.unsqueeze(0), len(choices)).squeeze(0) != choices).sum())
    return f"choices must be the inverse of slots, {wrong} rows hold others" if wrong else None


def _assign_dropless_slots(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    options = {"num_experts": sizes.experts, "group_size": -(-sizes.tokens // 2)}
    experts = _chosen(device, sizes)
    got = kernels.assign_dropless_slots(experts, **options)
    want = kernels.assign_dropless_slots_reference(experts, tile=ROW_TILE, **options)
    found = {}
    for name, own, twin in zip(("slots", "spans"), got, want):
        others = int((own != twin).sum()) if own.shape == twin.shape else twin.numel()
        fault = f"{name} must be the twin's, {others} are others" if others else None
        found[name] = Comparison(torch.inf if others else 0.0, 0.0, 0.0, fault)
    return found


def _chosen(device: torch.device, sizes: Sizes) -> Tensor:
    """(T, K) int32 experts, others for each choice of a token."""
    scores = torch.rand(sizes.tokens, sizes.experts, generator=torch.Generator().manual_seed(6))
    return scores.topk(sizes.selected).indices.to(device, torch.int32).contiguous()


def _routed(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Tensor]:
    shape = (sizes.tokens, sizes.selected, sizes.experts, sizes.capacity, sizes.width)
    routed = make_routed("random", shape, dtype, device=str(device))
    return routed if dtype != torch.float64 else {**routed, "gates": routed["gates"].double()}


def _experts(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Tensor]:
    return make_experts((sizes.experts, sizes.width, sizes.hidden, sizes.width), dtype, device=str(device))


def _dispatch(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    routed = _routed(dtype, device, sizes)
    return _compared("dispatch", {"x": routed["x"], "slots": routed["slots"], "num_rows": len(routed["buffer"])})


def _combine(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    routed = _routed(dtype, device, sizes)
    return _compared("combine", {name: routed[name] for name in ("buffer", "slots", "gates")})


def _expert_mlp(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    make = torch.Generator().manual_seed(5)
    x = torch.randn(sizes.experts, sizes.capacity, sizes.width, generator=make).to(device, dtype)
    return _compared("expert_mlp", {"x": x, **_experts(dtype, device, sizes)}, activation="gelu_tanh")


def _moe_mlp(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    routed = {name: value for name, value in _routed(dtype, device, sizes).items() if name != "buffer"}
    inputs = {name: routed[name] for name in ("x", "slots", "gates")}
    inputs |= _experts(dtype, device, sizes)
    return _compared("moe_mlp", inputs, activation="gelu", rows_per_expert=sizes.capacity)


def _dropless_mlp(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Comparison]:
    slots, spans = kernels.assign_dropless_slots(_chosen(device, sizes), num_experts=sizes.experts)
    routed = _routed(dtype, device, sizes)
    inputs = {"x": routed["x"], "slots": slots, "spans": spans, "gates": routed["gates"]}
    return _compared("dropless_mlp", {**inputs, **_experts(dtype, device, sizes)}, activation="gelu_tanh")


def _compared(op: str, inputs: dict[str, Any], **options: Any) -> dict[str, Comparison]:
    """An op of one output beside its twin; its first input names the dtype."""
    dtype = next(iter(inputs.values())).dtype
    both = (partial(getattr(kernels, name), **options) for name in (op, f"{op}_reference"))
    return compare_with_eager(*both, inputs, ulps=ULPS[dtype])


# The ops by their names in vmoe_kernels, in the order of a layer.
OPS: dict[str, Callable[[torch.dtype, torch.device, Sizes], dict[str, Comparison]]] = {
    "router": _router,
    "assign_slots": _assign_slots,
    "dispatch": _dispatch,
    "expert_mlp": _expert_mlp,
    "combine": _combine,
    "moe_mlp": _moe_mlp,
    "assign_dropless_slots": _assign_dropless_slots,
    "dropless_mlp": _dropless_mlp,
}
