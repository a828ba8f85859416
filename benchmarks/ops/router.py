"""Router: logits, softmax and top-k in one pass over x, against eager PyTorch and torch.compile."""

import vmoe_kernels as kernels
from benchmarks.harness import work
from benchmarks.harness.cases import Layer
from benchmarks.harness.results import Ceiling
from benchmarks.harness.session import Session

OP = "router"


def run(session: Session) -> None:
    """Forward and backward at every case, noise-free."""
    for case in session.cases:
        if not session.begin(f"{OP} {case.name}"):
            return
        layer = Layer(case, session.device, session.dtype)
        settings = {"num_selected_experts": case.num_selected, "group_size": case.group_size}

        def ours(x, weight, settings=settings):
            return kernels.router(x, weight, **settings).gates

        def eager(x, weight, settings=settings):
            return kernels.router_reference(x, weight, **settings).gates

        session.compare(
            OP,
            case.name,
            {"ours": ours, "eager": eager, "compile": session.compiler(eager)},
            {"x": layer.x, "weight": layer.router},
            work.router(case, layer.x.element_size()),
            Ceiling("copy", session.ceilings["copy"], "bytes"),
        )
