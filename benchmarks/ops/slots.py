"""Slots: which choices are kept, vanilla and BPR, typical and worst case, against eager PyTorch and torch.compile."""

from collections.abc import Callable

import torch
from torch import Tensor

import vmoe_kernels as kernels
from benchmarks.harness import work
from benchmarks.harness.cases import Case
from benchmarks.harness.session import Session, first_line

OP = "slots"


def run(session: Session) -> None:
    """One group, then groups as routed; random experts, and all tokens to one expert; the first two cases."""
    for case in session.cases[:2]:
        for whole_batch in (True, False):
            for load in ("random", "one expert"):
                group_size = case.num_tokens if whole_batch else case.group_size
                name = f"{case.name} G={case.num_tokens // group_size} {load}"
                if not session.begin(f"{OP} {name}"):
                    return
                _compare(session, case, group_size, load, name)


def _compare(session: Session, case: Case, group_size: int, load: str, name: str) -> None:
    experts, gates = _choices(case, load, session.device)
    capacity = kernels.compute_capacity(group_size, case.num_experts, case.capacity_factor, case.num_selected)
    settings = {
        "num_experts": case.num_experts,
        "group_size": group_size,
        "capacity": capacity,
        "last_capacity": capacity,
    }
    reference = kernels.assign_slots_reference
    for order, priority in (("BPR", True), ("vanilla", False)):
        variants = {"ours": kernels.assign_slots, "eager": reference}
        if load == "random":
            variants["compile"] = session.compiler(reference)
        calls: dict[str, Callable[[], Tensor]] = {
            variant: lambda call=call, priority=priority: call(experts, gates, batch_priority=priority, **settings)
            for variant, call in variants.items()
        }
        want = calls["eager"]()
        # Which choices are kept is defined; where in its expert's part a row lies is not.
        expert = torch.where(want < 0, -1, experts)
        good = {}
        rows = kernels.rows_per_expert(case.num_tokens, group_size, capacity, capacity)
        for variant, call in calls.items():
            try:
                got = call()
            except Exception as error:  # An opponent may not compile: noted, left out.
                session.note(f"{OP} {name} {order}: {variant} is left out: {first_line(error)}")
                continue
            if torch.equal(torch.where(got < 0, -1, got // rows), expert) and _unique(got):
                good[variant] = call
            else:
                session.note(f"{OP} {name} {order}: {variant} keeps other choices than the reference: not timed")
        if "ours" in good:
            session.time(OP, "forward", f"{name} {order}", good, work.slots(case)["forward"])


def _unique(slots: Tensor) -> bool:
    kept = slots[slots >= 0]
    return kept.unique().numel() == kept.numel()


def _choices(case: Case, load: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(T, K) experts and gates; under "one expert" every first choice is expert 0."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(case.num_tokens, case.num_experts, generator=generator, device=device)
    if load == "one expert":
        scores[:, 0] += 20.0
    gates, experts = scores.softmax(-1).topk(case.num_selected)
    return experts.to(torch.int32), gates
