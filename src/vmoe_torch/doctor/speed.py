"""How fast a layer is on a device: routing and experts, beside its bare matrix products and beside eager PyTorch.

The products are those of the experts alone, by the library that PyTorch has for them (cuBLAS, MKL, oneDNN): no layer is
faster. Runs of all three take turns, and medians count.

Dims: T tokens, K selected, E experts, R rows per expert, D width, H hidden width.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import vmoe_kernels as kernels
from vmoe_kernels.common.impl import has_kernels
from vmoe_kernels.testing import make_experts
from vmoe_torch.doctor.ops import DTYPES, Sizes

# float64 is for checks, nobody trains in it.
TIMED = ("float32", "bfloat16", "float16")
# Two images through an expert layer of V-MoE's width-384 kin on a CPU, 64 through V-MoE-B's on a GPU; capacity 1.05.
SIZES = {"cpu": Sizes(394, 1, 8, 52, 384, 1536), "cuda": Sizes(12_608, 1, 8, 1656, 768, 3072)}


@dataclass(frozen=True)
class Speed:
    """A layer in one dtype and direction; seconds are medians."""

    dtype: str
    """Of the tokens and weights."""
    direction: str
    """"forward", or "forward and backward"."""
    ours: float
    """Seconds with impl="auto"."""
    eager: float
    """Seconds with impl="reference"."""
    products: float
    """Seconds of the bare matrix products."""
    flops: float
    """Of the products."""
    rounds: int
    """Runs of each."""


def measure_all(
    device: torch.device, seconds: float, leave_out: tuple[str, ...] = (), progress: Callable = iter
) -> Iterator[Speed]:
    """Yields the speed of the layer in each dtype, forward, then forward and backward.

    Args:
        device: where the layer runs.
        seconds: for all of it.
        leave_out: dtypes whose results are wrong, which have no speed.
        progress: wraps the list of what is to be done.
    """
    cases = [(dtype, train) for dtype in TIMED if dtype not in leave_out for train in (False, True)]
    end = time.monotonic() + seconds
    for number, (dtype, train) in enumerate(progress(cases)):
        # What a case leaves goes to the next ones.
        yield measure(device, dtype, train, (end - time.monotonic()) / (len(cases) - number), SIZES[device.type])


def measure(device: torch.device, dtype: str, train: bool, seconds: float, sizes: Sizes) -> Speed:
    """One of them, in about so many seconds."""
    calls = _calls(device, DTYPES[dtype], train, sizes)
    end = time.monotonic() + seconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    while not times["ours"] or time.monotonic() < end:
        for name, call in calls.items():
            times[name].append(_seconds(device, call))
    # The first round warms up. Where it took all the time, it has to do.
    times = {name: own[1:] or own for name, own in times.items()}
    flops = (3 if train else 1) * 4.0 * sizes.width * sizes.hidden * sizes.experts * sizes.capacity
    medians = {name: statistics.median(own) for name, own in times.items()}
    direction = "forward and backward" if train else "forward"
    return Speed(dtype, direction, **medians, flops=flops, rounds=len(times["ours"]))


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _calls(device: torch.device, dtype: torch.dtype, train: bool, sizes: Sizes) -> Mapping[str, Callable[[], object]]:
    make = torch.Generator().manual_seed(6)
    x = torch.randn(sizes.tokens, sizes.width, generator=make).to(device, dtype)
    router = (torch.randn(sizes.experts, sizes.width, generator=make) * sizes.width**-0.5).to(device, dtype)
    experts = make_experts((sizes.experts, sizes.width, sizes.hidden, sizes.width), dtype, device=str(device))
    d_y = torch.randn(x.shape, generator=make).to(device, dtype)
    leaves = [x.requires_grad_(train), router.requires_grad_(train)]
    leaves += [each.requires_grad_(train) for each in experts.values() if each is not None]

    def layer(impl: str) -> Callable[[], object]:
        # As MoeMlp does: on a GPU the choices of the rows come with the slots.
        with_rows = impl == "auto" and has_kernels(device)
        assign = kernels.assign_rows if with_rows else kernels.assign_slots
        places = {"num_experts": sizes.experts, "capacity": sizes.capacity, "impl": impl}
        settings = {"rows_per_expert": sizes.capacity, "activation": "gelu", "impl": impl}

        def call() -> object:
            scored = kernels.router(x, router, num_selected_experts=sizes.selected, impl=impl)
            assigned = assign(scored.experts, scored.gates, **places)
            slots, choices = assigned if with_rows else (assigned, None)
            y = kernels.moe_mlp(x, slots, scored.gates, **experts, choices=choices, **settings)
            return torch.autograd.grad(y, leaves, d_y) if train else y

        return call

    rows = torch.randn(sizes.experts, sizes.capacity, sizes.width, generator=make).to(device, dtype)
    hidden = torch.randn(sizes.experts, sizes.capacity, sizes.hidden, generator=make).to(device, dtype)
    products = _products(rows, hidden, experts["fc1_weight"].detach(), experts["fc2_weight"].detach(), train)
    return {"ours": layer("auto"), "eager": layer("reference"), "products": products}


def _products(rows: Tensor, hidden: Tensor, fc1: Tensor, fc2: Tensor, train: bool) -> Callable[[], object]:
    """The experts' matrix products: two forward, four more backward."""

    def call() -> None:
        torch.bmm(rows, fc1.mT)
        torch.bmm(hidden, fc2.mT)
        if train:
            # The gradients have the shapes of what they are of.
            torch.bmm(rows, fc2)
            torch.bmm(rows.mT, hidden)
            torch.bmm(hidden, fc1)
            torch.bmm(hidden.mT, rows)

    return call
