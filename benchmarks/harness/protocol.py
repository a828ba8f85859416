"""How every number here is measured: interleaved runs, medians with 20/80 quantiles, nothing timed that is wrong.

On CUDA a run is timed by events with a cold L2, behind a spinning kernel that lets the host enqueue the whole run
first, so that the time is the device's alone.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Variants = Mapping[str, Callable[[], object]]
MIN_RUNS, MAX_RUNS = 5, 200
# An L2 of 60 MB (H200) or 126 MB (B200) keeps nothing of what was there before.
FLUSH_BYTES = 512 << 20
# Cycles that a spinning kernel spends in a second, at most; a slower clock only spins longer.
CYCLES_PER_SECOND = 2.0e9


@dataclass(frozen=True)
class Samples:
    """Seconds of every run of a variant, in the order of the rounds."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The q-quantile, in 0..1, by linear interpolation."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(q).item()

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def over(self, other: "Samples") -> "Samples":
        """Ratio to another variant, round by round: what disturbs a round disturbs both."""
        return Samples(tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True)))


def exponent(sweep: dict[float, Samples]) -> Samples:
    """Slope of log time over log value, by least squares, round by round: 1 is linear."""
    logs = torch.tensor(list(sweep), dtype=torch.float64).log()
    times = torch.tensor([each.seconds for each in sweep.values()], dtype=torch.float64).log()
    centred = (logs - logs.mean()).unsqueeze(1)
    return Samples(tuple((centred * times).sum(0).div(centred.square().sum()).tolist()))


def change(sweep: dict[float, Samples]) -> Samples:
    """The slowest value's time over the fastest one's, round by round."""
    slowest, fastest = (pick(sweep.values(), key=lambda each: each.median) for pick in (max, min))
    return slowest.over(fastest)


def measure(variants: Variants, device: torch.device, budget: float, min_runs: int = MIN_RUNS) -> dict[str, Samples]:
    """Times variants in turn, round after round, after a warm-up of each.

    Args:
        variants: name to a call that does the work and leaves nothing behind.
        device: where the work runs; CUDA is timed by events, anything else by the host's clock.
        budget: seconds for all variants together, warm-up excluded.
        min_runs: rounds that are run whatever the budget.

    Returns:
        Samples of each variant, all with the same number of runs.
    """
    timer = _CudaTimer(device) if device.type == "cuda" else _HostTimer()
    costs = {name: timer.warm_up(call) for name, call in variants.items()}
    rounds = int(budget / max(sum(costs.values()), 1e-9))
    rounds = min(max(rounds, min_runs), MAX_RUNS)
    for _ in range(rounds):
        for name, call in variants.items():
            timer.run(name, call)
    return timer.samples()


class _HostTimer:
    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def warm_up(self, call: Callable[[], object]) -> float:
        """Seconds of a warm run."""
        call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def run(self, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def samples(self) -> dict[str, Samples]:
        return {name: Samples(tuple(seconds)) for name, seconds in self.seconds.items()}


class _CudaTimer:
    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self.cycles: dict[Callable[[], object], int] = {}

    def warm_up(self, call: Callable[[], object]) -> float:
        """Seconds that a timed run will take, its flush and its spin included; also how long the host needs for it."""
        for _ in range(3):
            call()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        self.cycles[call] = int(1.5 * host * CYCLES_PER_SECOND) + 20_000
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start + 1.5 * host + 2 * FLUSH_BYTES / 4e12

    def run(self, name: str, call: Callable[[], object]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(self.cycles[call])
        begin.record()
        call()
        end.record()
        self.events.setdefault(name, []).append((begin, end))
        # Bounds the queue, so that the host never stalls inside a later run.
        torch.cuda.synchronize(self.device)

    def samples(self) -> dict[str, Samples]:
        torch.cuda.synchronize(self.device)
        return {
            name: Samples(tuple(begin.elapsed_time(end) * 1e-3 for begin, end in events))
            for name, events in self.events.items()
        }


def with_gradients(call: Callable[[], Tensor], inputs: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Output of a call and its gradient for each named input, so that nothing accumulates between runs."""
    out = call()
    gradients = torch.autograd.grad(out, list(inputs.values()), cotangent)
    return {"out": out.detach(), **{f"d_{name}": gradient for name, gradient in zip(inputs, gradients)}}


def one_update(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A training step to measure: gradients cleared, the loss and its backward, the optimiser's step."""

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return call


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact result; infinite where a value is not a number."""
    got, exact = got.detach().double(), exact.detach().double()
    if got.shape != exact.shape or not got.isfinite().all():
        return float("inf")
    scale = exact.norm().item()
    return (got - exact).norm().item() / (scale if scale > 0 else 1.0)


def require_close(got: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Every tensor is at most twice as far from the exact one as the eager reference's.

    Args:
        got: results by name.
        eager: the eager reference's, in the dtype that is measured.
        exact: the same in float64.

    Raises:
        RuntimeError: naming the first tensor that is further off; its variant must not be timed.
    """
    for name, tensor in got.items():
        error, budget = relative_error(tensor, exact[name]), 2.0 * relative_error(eager[name], exact[name]) + 1e-6
        if not error <= budget:
            raise RuntimeError(f"{name} must be within {budget:.1e} of float64, got {error:.1e}: not timed")


def peak_cuda_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs at its peak, beyond what was allocated before it."""
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_cpu_memory(call: Callable[[], object]) -> int:
    """The same on the CPU, from the allocator's own record."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
