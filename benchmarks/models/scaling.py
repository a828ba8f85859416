"""How the cost of a MoE layer's forward grows with tokens, experts, choices and capacity, each on its own.

Checked against the eager reference at every point before any is timed. Dims: T tokens, E experts, K selected, C
capacity factor, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.cases import CPU_LAYER, Case
from benchmarks.harness.protocol import measure, relative_error
from benchmarks.harness.session import Session
from benchmarks.layer.on_cpu import make_layer
from vmoe_torch.layers import MoeMlp

OP = "scaling"
# float32 sums of another order; in bfloat16 a token that lies on the edge may go to another expert.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# Logits of a token's own expert above those of all others, where loads are to be even.
MARGIN = 10.0


@dataclass(frozen=True)
class Sweep:
    """One quantity that varies, its values, and the case of each."""

    name: str  # "T", "E", "K" or "C"
    cases: dict[float, Case]
    even: bool = False  # every expert gets as many tokens, so that every slot is filled


def sweeps(base: Case) -> list[Sweep]:
    """A quarter to four times the base's tokens; E at eight times as many; K; C from little to more than is to keep.

    E has the most tokens, so that 64 experts have rows enough: a product of 200 rows takes a CPU's library a fifth more
    time per row than one of 1,600.
    """
    images = base.images
    wide = replace(base, images=8 * images, num_selected=1, capacity_factor=1.0)
    tokens = [replace(base, images=count) for count in (images // 4, images // 2, images, 2 * images, 4 * images)]
    return [
        Sweep("T", {case.num_tokens: case for case in tokens}),
        Sweep("E", {count: replace(wide, num_experts=count) for count in (8, 16, 32, 64)}, even=True),
        Sweep("K", {count: replace(base, num_selected=count) for count in (1, 2, 4)}),
        Sweep("C", {factor: replace(base, capacity_factor=factor) for factor in (0.125, 0.25, 0.5, 1.0, 2.0)}),
    ]


def run(session: Session, base: Case | None = None) -> None:
    """Every sweep: its points in turn, round after round."""
    if base is None:
        base = CPU_LAYER if session.device.type == "cpu" else session.cases[0]
    for sweep in sweeps(base):
        if not session.begin(f"{OP} {sweep.name}"):
            return
        calls = {}
        for value, case in sweep.cases.items():
            layer, x = layer_of(case, session, sweep.even)
            _require_parity(layer, x, f"{sweep.name}={value:g}")
            calls[value] = _forward(layer, x)
        budget = session.seconds_per_variant * len(calls)
        session.sweeps[sweep.name] = samples = measure(calls, session.device, budget)
        for value, each in samples.items():
            session.add(OP, "forward", f"{sweep.name}={value:g}: {sweep.cases[value].name}", {"ours": each})


def layer_of(case: Case, session: Session, even: bool) -> tuple[MoeMlp, Tensor]:
    """The layer of a case in eval mode and (B, L, D) tokens."""
    layer = make_layer(case).eval()
    layer.capacity_multiple_of = 1
    x = torch.randn(case.images * case.tokens_per_image, case.width)
    if even:
        # Orthonormal router weights: a token's own expert wins by the margin, for experts in turn.
        with torch.no_grad():
            torch.nn.init.orthogonal_(layer.router.weight)
        x += MARGIN * layer.router.weight[torch.arange(len(x)) % case.num_experts].detach()
    x = x.view(case.images, case.tokens_per_image, case.width)
    return layer.to(session.device, session.dtype), x.to(session.device, session.dtype)


@torch.no_grad()
def _require_parity(layer: MoeMlp, x: Tensor, what: str) -> None:
    got = layer(x)
    layer.impl = "reference"
    want = layer(x)
    layer.impl = "auto"
    error, budget = relative_error(got, want), TOLERANCES[x.dtype]
    if not error <= budget:
        raise RuntimeError(f"{what}: output must be within {budget:.0e} of the eager reference, got {error:.1e}")


def _forward(layer: MoeMlp, x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return layer(x)

    return call
