"""Combine: expert rows to tokens in one pass, forward and backward, against eager PyTorch and torch.compile."""

import vmoe_kernels as kernels
from benchmarks.harness import work
from benchmarks.harness.cases import Layer
from benchmarks.harness.results import Ceiling
from benchmarks.harness.session import Session

OP = "combine"


def run(session: Session) -> None:
    """Forward and backward (the gates' gradient included) at every case."""
    for case in session.cases:
        if not session.begin(f"{OP} {case.name}"):
            return
        layer = Layer(case, session.device, session.dtype)
        session.compare(
            OP,
            case.name,
            {
                "ours": kernels.combine,
                "eager": kernels.combine_reference,
                "compile": session.compiler(kernels.combine_reference),
            },
            {"buffer": layer.buffer.flatten(0, 1), "gates": layer.routing.gates},
            work.combine(case, layer.x.element_size()),
            Ceiling("copy", session.ceilings["copy"], "bytes"),
            fixed={"slots": layer.routing.slots},
        )
