"""Dispatch: tokens to expert rows in one pass, forward and backward, against eager PyTorch and torch.compile."""

import vmoe_kernels as kernels
from benchmarks.harness import work
from benchmarks.harness.cases import Layer
from benchmarks.harness.results import Ceiling
from benchmarks.harness.session import Session

OP = "dispatch"


def run(session: Session) -> None:
    """Forward and backward at every case."""
    for case in session.cases:
        if not session.begin(f"{OP} {case.name}"):
            return
        layer = Layer(case, session.device, session.dtype)

        def ours(x, slots, rows=case.num_rows):
            return kernels.dispatch(x, slots, rows)

        def eager(x, slots, rows=case.num_rows):
            return kernels.dispatch_reference(x, slots, rows)

        session.compare(
            OP,
            case.name,
            {"ours": ours, "eager": eager, "compile": session.compiler(eager)},
            {"x": layer.x},
            work.dispatch(case, layer.x.element_size()),
            Ceiling("copy", session.ceilings["copy"], "bytes"),
            fixed={"slots": layer.routing.slots},
        )
