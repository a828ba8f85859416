"""The whole MoE layer on a GPU against every opponent, its share outside the expert MLP, and its training memory."""

import torch
from torch import Tensor

import vmoe_kernels as kernels
from benchmarks.harness import work
from benchmarks.harness.cases import Case, Layer
from benchmarks.harness.ceilings import bmm_rate
from benchmarks.harness.opponents import layer_variants, mlp_variants, scattermoe
from benchmarks.harness.protocol import peak_cuda_memory, relative_error, with_gradients
from benchmarks.harness.results import Ceiling
from benchmarks.harness.session import Session, Variant, first_line

OP = "moe_layer"
# Logits that differ in rounding order the tokens differently where two are nearly equal.
TIES = 2e-3


def run(session: Session) -> None:
    """Forward, and forward with backward, at every case."""
    for case in session.cases:
        if not session.begin(f"{OP} {case.name}"):
            return
        layer = Layer(case, session.device, session.dtype)
        good = _checked(session, case, layer)
        if "ours" not in good:
            continue
        inputs = {"x": layer.x, "router": layer.router, **layer.weights}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        least = work.moe_layer(case, layer.x.element_size())
        ceiling = Ceiling("cuBLAS bmm at this shape", bmm_rate(session, case), "flops")
        buffer, weights = layer.buffer, layer.weights

        @torch.no_grad()
        def forward(variant: Variant, inputs=inputs) -> Tensor:
            return variant(**inputs)

        def both(variant: Variant, leaves=leaves, layer=layer) -> dict[str, Tensor]:
            return with_gradients(lambda: variant(**leaves), leaves, layer.d_y)

        @torch.no_grad()
        def experts_only(buffer=buffer, weights=weights) -> Tensor:
            return kernels.expert_mlp(buffer, **weights)

        calls = {name: lambda variant=variant: forward(variant) for name, variant in good.items()}
        session.time(
            OP, "forward", case.name, {**calls, "our expert MLP alone": experts_only}, least["forward"], ceiling
        )
        steps = {name: lambda variant=variant: both(variant) for name, variant in good.items()}
        session.time(OP, "both", case.name, steps, least["both"], ceiling)
        if session.device.type == "cuda":
            for name in {"ours", "eager"} & set(steps):
                session.memory[case.name, name] = peak_cuda_memory(steps[name], session.device)
        _scattermoe(session, layer)


def _checked(session: Session, case: Case, layer: Layer) -> dict[str, Variant]:
    """Variants whose MLP is right at given slots, output and gradients, and that route as the reference does."""
    routing = layer.routing
    fixed = {"slots": routing.slots}
    inputs = {"x": layer.x, "gates": routing.gates, **layer.weights}
    what = f"{OP} {case.name}"
    good = session.check(what, session.trimmed(case, mlp_variants(case, session.compiler)), inputs, fixed)
    chained = layer_variants(case, session.compiler, good)
    with torch.no_grad():
        want = chained["eager"](layer.x, layer.router, **layer.weights)
        for name in list(good):
            try:
                moved = _moved_tokens(chained[name](layer.x, layer.router, **layer.weights), want)
                if moved > TIES:
                    raise RuntimeError(f"{moved:.1%} of the tokens differ from the reference")
            except Exception as error:  # The routing of an opponent may not compile: noted, left out.
                session.note(f"{what}: {name} is left out: {first_line(error)}")
                del good[name]
    return {name: chained[name] for name in good}


def _moved_tokens(got: Tensor, want: Tensor) -> float:
    """Share of tokens that are off by more than rounding: routed elsewhere."""
    off = (got.float() - want.float()).norm(dim=1) > 0.05 * want.float().norm(dim=1) + 1e-6
    return (off | ~got.isfinite().all(1)).float().mean().item()


def _scattermoe(session: Session, layer: Layer) -> None:
    """Its MLP without biases or capacity, given the gates: less work than the layer's."""
    what = f"{OP} {layer.case.name}"
    try:
        made = scattermoe(layer)
        if made is None:
            return
        call, want = made
        error = relative_error(call(), want)
        if not error <= 0.02:
            raise RuntimeError(f"off by {error:.1e} from the eager reference")
    except Exception as error:  # A package of its own, of any version: noted, left out.
        session.note(f"{what}: ScatterMoE is left out: {first_line(error)}")
        return
    session.time(OP, "forward", f"{layer.case.name}, no bias, no drops, routing given", {"ScatterMoE": call})
