"""Whole models: images per second of a V-MoE (K=1, C=1) beside timm's dense ViT of its dims, eager and compiled.

On a GPU vmoe_b16 beside ViT-B/16, on a CPU vmoe_s32 with 8 experts beside a ViT-S/32 of the same width and depth.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.pairs import PAIRS, Pair, check_compiled, check_models, kept_share, make_models
from benchmarks.harness.protocol import Samples
from benchmarks.harness.session import Session, first_line

OP = "model"
# Steps that follow each other without a wait, as in training; one sample is their mean.
ROUNDS, STEPS = 10, 3


def run(session: Session, pair: Pair | None = None) -> None:
    """All models in turn, wall-clock over whole steps: what a user of the model sees, launches included."""
    if not session.begin(OP):
        return
    pair = pair or PAIRS[session.device.type]
    models, x = make_models(pair, session.device, session.dtype)
    check_models(models, x)
    session.note(f"{OP}: {kept_share(models['ours'], x):.0%} of the choices of {pair.moe} at C=1 found a slot")
    # Compiling takes longest, so it comes last.
    for compiled in (False, True):
        for direction in ("forward", "both"):
            case = f"B={len(x)} {x.shape[-1]} px{', compiled' if compiled else ''}"
            if not session.begin(f"{OP} {direction} {case}"):
                return
            try:
                time_calls(session, OP, direction, case, _calls(session, models, x, direction, compiled))
            except Exception as error:  # A failure of one mode must not cost the others their numbers.
                session.note(f"{OP} {direction} {case}: left out: {first_line(error)}")
            for model in models.values():
                model.zero_grad(set_to_none=True)


def _calls(
    session: Session, models: dict[str, nn.Module], x: Tensor, direction: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    calls = {}
    for name, model in models.items():
        function = model.train(direction == "both")
        if compiled:
            function = session.compiler(model)
            check_compiled(function, model, x)
        calls[name] = _training(model, function, x) if direction == "both" else _inference(function, x)
    return calls


def _inference(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def call():
        return function(x)

    return call


def _training(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def call():
        model.zero_grad(set_to_none=True)
        function(x).float().square().mean().backward()

    return call


def time_calls(session: Session, op: str, direction: str, case: str, calls: dict[str, Callable[[], object]]) -> None:
    """Calls in turn, round after round, by the host's clock; on a GPU a sample is the mean of STEPS calls in a row."""
    if session.device.type != "cuda":
        session.time(op, direction, case, calls)
        return
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize(session.device)
            start = time.perf_counter()
            for _ in range(STEPS):
                call()
            torch.cuda.synchronize(session.device)
            seconds[name].append((time.perf_counter() - start) / STEPS)
    session.add(op, direction, case, {name: Samples(tuple(times)) for name, times in seconds.items()})
