"""The MoE layer on a CPU in 16 bits, against its own bare products in the same type.

Dims as in `benchmarks.harness.cases`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness.cases import CPU_LAYER, Case
from benchmarks.harness.entries import Entry
from benchmarks.harness.protocol import Samples, measure, require_close
from benchmarks.harness.results import Row, row
from benchmarks.layer.on_cpu import CPU, OP, bare_gemms, make_layer, tokens, training_step
from vmoe_kernels.experts.cpu import has_products

LIMIT = 1.15
DTYPES = (torch.bfloat16, torch.float16)
# Where a CPU has no products of a type, PyTorch's take many times as long as those of float32: a shape that
# this leaves seconds for.
SMALL = replace(CPU_LAYER, images=8, hidden=256)


def case_for(dtype: torch.dtype) -> Case:
    """The bar's shape, or a small one where this CPU multiplies numbers of the type one by one."""
    return CPU_LAYER if has_products(dtype) else SMALL


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check(case: Case, dtype: torch.dtype, x: Tensor, d_y: Tensor) -> None:
    """Output and every gradient are at most twice as far from float64 as the eager reference's, in the same type.

    Raises:
        RuntimeError: naming the first that is further off; nothing is timed then.
    """
    got, eager = (training_step(make_layer(case, impl).to(dtype), x, d_y) for impl in ("auto", "reference"))
    # The weights that both of them have, rounded.
    exact = make_layer(case, "reference").to(dtype).double()
    require_close(got, eager, training_step(exact, x.detach().double().requires_grad_(), d_y.double()))


def time_dtype(case: Case, dtype: torch.dtype, seconds: float) -> dict[str, Samples]:
    """Every variant by name, "<variant>/<direction>", beside float32's products."""
    x = tokens(case).detach().to(dtype).requires_grad_()
    d_y = torch.randn(x.shape).to(dtype)
    check(case, dtype, x, d_y)
    layer, frozen = (make_layer(case).to(dtype) for _ in range(2))
    frozen.eval()
    forward, both = bare_gemms(case, ready=False, dtype=dtype)
    forward_float32, both_float32 = bare_gemms(case, ready=False)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return frozen(x)

    name = name_of(dtype)
    return measure(
        {
            "bare GEMMs, float32/forward": forward_float32,
            f"bare GEMMs, {name}/forward": forward,
            f"MoeMlp, {name}, eval/forward": evaluate,
            f"MoeMlp, {name}, train/forward": lambda: layer(x),
            "bare GEMMs, float32/both": both_float32,
            f"bare GEMMs, {name}/both": both,
            f"MoeMlp, {name}, train/both": lambda: training_step(layer, x, d_y),
        },
        CPU,
        seconds,
    )


def entries(dtype: torch.dtype, samples: dict[str, Samples], note: str = "") -> list[Entry]:
    """Bars against the products of the type, and how those and the layer stand to float32's products."""
    name = name_of(dtype)
    ours = {"forward, eval": f"MoeMlp, {name}, eval/forward", "forward, train": f"MoeMlp, {name}, train/forward"}
    ours["forward + backward"] = f"MoeMlp, {name}, train/both"
    found = []
    for what, variant in ours.items():
        direction = variant.rpartition("/")[2]
        bare = samples[f"bare GEMMs, {name}/{direction}"]
        found.append(Entry.of(f"{what}, {name}: MoeMlp over its bare GEMMs", LIMIT, samples[variant].over(bare), note))
    for direction, what in (("forward", "forward"), ("both", "forward + backward")):
        wide = samples[f"bare GEMMs, float32/{direction}"]
        for variant in (f"bare GEMMs, {name}", f"MoeMlp, {name}, train"):
            ratio = samples[f"{variant}/{direction}"].over(wide)
            found.append(Entry.of(f"{what}: {variant} over float32's bare GEMMs", None, ratio))
    return found


def run(seconds: float) -> tuple[list[Entry], list[Row]]:
    """Both types, each checked first."""
    found, rows = [], []
    for dtype in DTYPES:
        torch.manual_seed(0)
        case = case_for(dtype)
        note = "" if has_products(dtype) else f"this CPU has no products of {name_of(dtype)}: at {case.name}"
        samples = time_dtype(case, dtype, seconds / len(DTYPES))
        found += entries(dtype, samples, note)
        for name, each in samples.items():
            variant, direction = name.split("/")
            rows.append(row(OP, direction, case.name, variant, each, flops=_flops(case, direction)))
    return found, rows


def _flops(case: Case, direction: str) -> int:
    return case.mlp_flops * (3 if direction == "both" else 1)
