"""Expert MLP on a dispatched buffer, against eager PyTorch, torch.compile, cuBLAS bmm and grouped_mm."""

from benchmarks.harness import work
from benchmarks.harness.cases import Layer
from benchmarks.harness.ceilings import bmm_rate
from benchmarks.harness.opponents import expert_variants
from benchmarks.harness.results import Ceiling
from benchmarks.harness.session import Session

OP = "expert_mlp"


def run(session: Session) -> None:
    """Forward, and forward with backward, at every case."""
    for case in session.cases:
        if not session.begin(f"{OP} {case.name}"):
            return
        layer = Layer(case, session.device, session.dtype)
        session.compare(
            OP,
            case.name,
            session.trimmed(case, expert_variants(case, session.compiler)),
            {"x": layer.buffer, **layer.weights},
            work.expert_mlp(case, layer.x.element_size()),
            Ceiling("cuBLAS bmm at this shape", bmm_rate(session, case), "flops"),
        )
