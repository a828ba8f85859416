"""The MoE layer on a CPU beside other people's, in the same run at the same shape, capacity and K as far as they allow.

Written here, with our routing: one-hot dispatch (GShard, Mesh TensorFlow, the original's formulation), and
`F.grouped_mm` with eager bias and GELU between our dispatch and combine. Packages, where they are installed:
st-moe-pytorch and Tutel, with our weights copied in. Before a package is timed, its layer must give our output and
gradient where nothing is dropped.

Dims as in `benchmarks.harness.cases`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

import vmoe_kernels as kernels
from benchmarks.harness.cases import CPU_LAYER, Case, Layer
from benchmarks.harness.entries import Entry
from benchmarks.harness.opponents import expert_variants, layer_variants, mlp_variants
from benchmarks.harness.protocol import Samples, measure, relative_error, with_gradients
from benchmarks.harness.results import Row, row
from benchmarks.harness.session import Session, first_line
from benchmarks.layer.on_cpu import CPU, OP, make_layer, training_step
from vmoe_torch.layers import MoeMlp

OURS = "MoeMlp"
DTYPES = (torch.float32, torch.bfloat16)
# Where packages are checked: whole groups, and every expert has rows.
CHECKED = replace(CPU_LAYER, images=16, tokens_per_image=10, group_images=8, width=64, hidden=128)
ONE_HOT, GROUPED = "one-hot einsum", "F.grouped_mm"
Call = Callable[[], object]


class StMoe(nn.Module):
    """st-moe-pytorch's layer: (B, L, D) to the same, and its auxiliary losses."""

    def __init__(self, case: Case, layer: MoeMlp):
        from st_moe_pytorch import MoE

        super().__init__()
        experts = nn.ModuleList(
            Mlp(case.width, case.hidden, act_layer=lambda: nn.GELU(approximate="tanh")) for _ in range(case.num_experts)
        )
        factor = case.capacity_factor * case.num_selected
        self.moe = MoE(
            case.width,
            num_experts=case.num_experts,
            gating_top_n=case.num_selected,
            # Else gates have a second gradient, through dispatch, and second choices are left out at random.
            straight_through_dispatch_tensor=False,
            threshold_train=0.0,
            threshold_eval=0.0,
            capacity_factor_train=factor,
            capacity_factor_eval=factor,
            experts=experts,
        )
        self.case = case
        with torch.no_grad():
            self.moe.gate.to_gates.weight.copy_(layer.router.weight)
            for e, expert in enumerate(experts):
                for ours, theirs in ((layer.fc1, expert.fc1), (layer.fc2, expert.fc2)):
                    theirs.weight.copy_(ours.weight[e])
                    theirs.bias.copy_(ours.bias[e])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result = self.moe(x.reshape(-1, self.case.group_size, self.case.width))
        return result.outputs.view_as(x), result.total_aux_loss


class Tutel(nn.Module):
    """Tutel's layer: the same; all tokens are one group."""

    def __init__(self, case: Case, layer: MoeMlp):
        from tutel.moe import moe_layer

        super().__init__()
        self.moe = moe_layer(
            gate_type={"type": "top", "k": case.num_selected, "capacity_factor": case.capacity_factor},
            experts={
                "type": "ffn",
                "num_experts_per_device": case.num_experts,
                "hidden_size_per_expert": case.hidden,
                "activation_fn": lambda x: F.gelu(x, approximate="tanh"),
            },
            model_dim=case.width,
            batch_prioritized_routing=True,
        )
        with torch.no_grad():
            self.moe.gates[0].wg.weight.copy_(layer.router.weight)
            self.moe.experts.batched_fc1_w.copy_(layer.fc1.weight)
            self.moe.experts.batched_fc1_bias.copy_(layer.fc1.bias)
            self.moe.experts.batched_fc2_w.copy_(layer.fc2.weight.mT)
            self.moe.experts.batched_fc2_bias.copy_(layer.fc2.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.moe(x)
        return y, y.l_aux


@dataclass(frozen=True)
class Package:
    """A layer of somebody else's."""

    module: str
    """What is imported."""
    install: str
    """How it is installed."""
    make: Callable[[Case, MoeMlp], nn.Module]
    """Its layer with the weights of ours."""
    note: str
    """How its work differs from ours."""


PACKAGES = {
    "st-moe-pytorch": Package(
        "st_moe_pytorch",
        "pip install st-moe-pytorch",
        StMoe,
        "slots in position order, capacity not rounded up",
    ),
    "Tutel": Package(
        "tutel",
        "NO_CUDA=1 pip install --no-build-isolation git+https://github.com/microsoft/tutel (PyPI has none)",
        Tutel,
        "all tokens are one group; dispatch and combine are float32",
    ),
}


def missing(package: Package) -> str | None:
    """Why a package cannot be measured, in words, or None."""
    if importlib.util.find_spec(package.module) is None:
        return f"not installed: {package.install}"
    return None


def check_package(package: Package, case: Case = CHECKED) -> None:
    """With room for every choice, its layer gives our output and gradient of the input.

    Raises:
        RuntimeError: if it does not; it is not timed then.
    """
    roomy = replace(case, capacity_factor=float(case.num_experts))
    ours = make_layer(roomy).eval()
    ours.renormalize_gates = True
    theirs = package.make(roomy, ours).eval()
    x = torch.randn(case.images, case.tokens_per_image, case.width, requires_grad=True)
    d_y = torch.randn(x.shape)
    want, got = (with_gradients(call, {"x": x}, d_y) for call in (lambda: ours(x), lambda: theirs(x)[0]))
    for name, tensor in got.items():
        error = relative_error(tensor, want[name])
        if not error <= 1e-4:
            raise RuntimeError(f"{name} must be within 1e-4 of ours where nothing is dropped, got {error:.1e}")


def layer_of(data: Layer) -> MoeMlp:
    """Ours with the data's weights."""
    layer = make_layer(data.case).to(data.x.dtype)
    parameters = {name.replace("_", "."): tensor for name, tensor in data.weights.items()}
    layer.load_state_dict({"router.weight": data.router, **parameters})
    return layer


def formulations(data: Layer, session: Session) -> dict[str, tuple[Call, Call]]:
    """Forward and forward + backward of what is written here; the session checks each and notes what fails."""
    case, known = data.case, mlp_variants(data.case, _as_it_is)
    mlps = {"eager": known["eager"], ONE_HOT: known["one-hot einsum"]}
    if hasattr(F, "grouped_mm"):
        mlps[GROUPED] = _between_ours(case, expert_variants(case, _as_it_is)["grouped_mm"])
    inputs = {"x": data.x, "router": data.router, **data.weights}
    good = session.check(case.name, layer_variants(case, _as_it_is, mlps), inputs, {})
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}

    def calls(variant: Callable[..., Tensor]) -> tuple[Call, Call]:
        @torch.no_grad()
        def forward() -> Tensor:
            return variant(**inputs)

        return forward, lambda: with_gradients(lambda: variant(**leaves), leaves, data.d_y)

    return {name: calls(good[name]) for name in (ONE_HOT, GROUPED) if name in good}


def _as_it_is(function: Callable) -> Callable:
    """In place of a compiler."""
    return function


def _between_ours(case: Case, experts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Experts that take (E, R, D), between our dispatch and combine."""

    def call(x, slots, gates, **weights) -> Tensor:
        buffer = kernels.dispatch(x, slots, num_rows=case.num_rows).view(case.num_experts, case.rows, -1)
        return kernels.combine(experts(buffer, **weights).flatten(0, 1), slots, gates)

    return call


def of_module(module: nn.Module, x: Tensor, d_y: Tensor) -> tuple[Call, Call]:
    """Forward in eval mode, and forward + backward in training mode with the auxiliary losses, of a package's layer."""
    parameters = list(module.parameters())
    one = torch.ones(())

    @torch.no_grad()
    def forward() -> Tensor:
        return module.eval()(x)[0]

    def both() -> tuple[Tensor, ...]:
        y, loss = module.train()(x)
        return torch.autograd.grad((y, loss), (x, *parameters), (d_y, one.to(loss.dtype)), allow_unused=True)

    return forward, both


def time_dtype(case: Case, dtype: torch.dtype, seconds: float) -> tuple[dict[str, Samples], dict[str, str]]:
    """Samples of every variant, "<variant>/<direction>", and why what is left out is left out, by variant."""
    data = Layer(case, CPU, dtype)
    layer = layer_of(data)
    session = Session(CPU, dtype)
    x = data.x.view(case.images, case.tokens_per_image, -1).requires_grad_()
    d_y = data.d_y.view_as(x)
    frozen = layer_of(data).eval()

    @torch.no_grad()
    def evaluate() -> Tensor:
        return frozen(x)

    found = {OURS: (evaluate, lambda: training_step(layer, x, d_y)), **formulations(data, session)}
    reasons = {name: _reason(name, session.notes) for name in (ONE_HOT, GROUPED) if name not in found}
    for name, package in PACKAGES.items():
        reason = missing(package)
        if reason is None:
            try:
                check_package(package)
                calls = of_module(package.make(case, layer).to(dtype), x, d_y)
                for call in calls:
                    call()
                found[name] = calls
            except Exception as error:  # A package may not take this PyTorch, this type or a CPU: named, left out.
                reason = f"left out: {first_line(error)}"
        if reason is not None:
            reasons[name] = reason
    directions = ("forward", "both")
    calls = {f"{name}/{way}": pair[k] for k, way in enumerate(directions) for name, pair in found.items()}
    return measure(calls, CPU, seconds), reasons


def _reason(name: str, notes: list[str]) -> str:
    """Why a formulation is not there."""
    said = next((note.partition(f"{name} is left out: ")[2] for note in notes if f"{name} is left out" in note), "")
    return f"left out: {said}" if said else "this PyTorch has none"


def entries(dtype: torch.dtype, samples: dict[str, Samples], reasons: dict[str, str]) -> list[Entry]:
    """Each peer's time over ours, or why there is none."""
    name_of_dtype = str(dtype).removeprefix("torch.")
    found = []
    for peer in (ONE_HOT, GROUPED, *PACKAGES):
        for direction, what in (("forward", "forward"), ("both", "forward + backward")):
            title = f"{what}, {name_of_dtype}: {peer} over {OURS}"
            if peer in reasons:
                found.append(Entry(title, note=reasons[peer]))
                continue
            note = PACKAGES[peer].note if peer in PACKAGES else ""
            ratio = samples[f"{peer}/{direction}"].over(samples[f"{OURS}/{direction}"])
            found.append(Entry.of(title, None, ratio, note))
    return found


def run(seconds: float, case: Case = CPU_LAYER) -> tuple[list[Entry], list[Row]]:
    """Both types."""
    found, rows = [], []
    for dtype, share in zip(DTYPES, (0.65, 0.35)):
        torch.manual_seed(0)
        samples, reasons = time_dtype(case, dtype, share * seconds)
        found += entries(dtype, samples, reasons)
        shape = f"{case.name} {dtype}".replace("torch.", "")
        for name, each in samples.items():
            variant, direction = name.split("/")
            flops = case.mlp_flops * (3 if direction == "both" else 1)
            rows.append(row(OP, direction, shape, variant, each, flops=flops))
    return found, rows
