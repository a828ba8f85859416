"""MoE layer on a CPU: MoeMlp against its own bare GEMMs, a dense timm Mlp and the original's published shape.

    python -m benchmarks.layer.on_cpu [--seconds 60] [--threads 2]

float32, x (64, 50, 512), G=8, E=8, K=2, C=1.05, H=2048: the shape at which the original JAX code was timed. Variants
run in turn, so a ratio compares neighbours in time. Writes benchmarks/results/<machine>/layer_on_cpu.{json,md}.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from timm.layers import Mlp
from torch import Tensor

from benchmarks.harness.cases import CPU_LAYER, Case
from benchmarks.harness.protocol import Samples, measure, peak_cpu_memory, relative_error, with_gradients
from benchmarks.harness.results import (
    Ceiling,
    Limit,
    Row,
    as_dicts,
    command_line,
    environment,
    heading,
    limit_table,
    machine_name,
    publish,
    row,
    table,
)
from vmoe_torch.layers import MoeMlp

CPU = torch.device("cpu")
OP = "moe_layer"
# golden/README.md: the original on 2 cores, float32, jit, where a 2048^3 matmul took 81 ms; its two dispatchers.
ORIGINAL_MS = {"forward": {"einsum": 231.0, "indices": 202.0}, "both": {"einsum": 714.0, "indices": 608.0}}
ORIGINAL_MATMUL_MS = 81.0


def make_layer(case: Case, impl: str = "auto") -> MoeMlp:
    """The layer of a case in training mode, noise-free, so that its result is a function of its input."""
    torch.manual_seed(0)
    layer = MoeMlp(
        case.width,
        case.hidden,
        act_layer="gelu_tanh",
        num_experts=case.num_experts,
        num_selected_experts=case.num_selected,
        capacity_factor=case.capacity_factor,
        group_size=case.group_images,
        noise_std=0.0,
        impl=impl,
    )
    with torch.no_grad():
        # A fresh layer has equal experts; unequal ones let a wrong slot show.
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter).mul_(0.02))
    return layer


def training_step(module: torch.nn.Module, x: Tensor, d_y: Tensor) -> dict[str, Tensor]:
    """Output of a module, and its gradients by name."""
    inputs = {"x": x, **dict(module.named_parameters())}
    return with_gradients(lambda: module(x), inputs, d_y)


def require_parity(case: Case, x: Tensor, d_y: Tensor) -> None:
    """The layer agrees with its eager reference, output and every gradient; otherwise nothing is timed."""
    got, want = (training_step(make_layer(case, impl), x, d_y) for impl in ("auto", "reference"))
    for name, tensor in got.items():
        error = relative_error(tensor, want[name])
        if not error <= 1e-5:
            raise RuntimeError(f"{name} must be within 1e-5 of the eager reference, got {error:.1e}: nothing is timed")


def bare_gemms(
    case: Case, ready: bool, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward's two batched products and the backward's four, at every row of the buffer.

    Results are allocated, as a program that calls torch.bmm has it, or go into memory that is there already (`ready`).
    """
    x, d_out = (torch.randn(case.num_experts, case.rows, case.width).to(dtype) for _ in range(2))
    activations, d_pre = (torch.randn(case.num_experts, case.rows, case.hidden).to(dtype) for _ in range(2))
    fc1_weight = torch.randn(case.num_experts, case.hidden, case.width).to(dtype)
    fc2_weight = torch.randn(case.num_experts, case.width, case.hidden).to(dtype)
    forwards = [(x, fc1_weight.mT), (activations, fc2_weight.mT)]
    backwards = [(d_out, fc2_weight), (d_out.mT, activations), (d_pre.mT, x), (d_pre, fc1_weight)]
    memory = [torch.bmm(*factors) if ready else None for factors in forwards + backwards]

    def forward() -> list[Tensor]:
        return [torch.bmm(*factors, out=out) for factors, out in zip(forwards, memory)]

    def both() -> list[Tensor]:
        return [torch.bmm(*factors, out=out) for factors, out in zip(forwards + backwards, memory)]

    return forward, both


def make_dense(case: Case) -> Mlp:
    """A timm Mlp that spends the layer's FLOPs on the same tokens."""
    hidden = round(case.hidden * case.num_rows / case.num_tokens)
    return Mlp(case.width, hidden, act_layer=lambda: torch.nn.GELU(approximate="tanh"))


def tokens(case: Case) -> Tensor:
    """(B, L, D), requires grad."""
    return torch.randn(case.images, case.tokens_per_image, case.width, requires_grad=True)


def time_layer(case: Case, x: Tensor, d_y: Tensor, seconds: float) -> dict[str, Samples]:
    """Every variant by name, "<variant>/<direction>"."""
    layer, dense = make_layer(case), make_dense(case)
    frozen = make_layer(case).eval()
    forward_gemms, both_gemms = bare_gemms(case, ready=False)
    ready_forward, ready_both = bare_gemms(case, ready=True)
    square = torch.randn(2, 2048, 2048)
    square_out = torch.empty(2048, 2048)

    @torch.no_grad()
    def evaluate(module: torch.nn.Module) -> Tensor:
        return module(x)

    return measure(
        {
            "matmul 2048^3/forward": lambda: torch.mm(square[0], square[1], out=square_out),
            "bare GEMMs/forward": forward_gemms,
            "bare GEMMs, ready memory/forward": ready_forward,
            "MoeMlp, eval/forward": lambda: evaluate(frozen),
            "MoeMlp, train/forward": lambda: layer(x),
            "dense Mlp, eval/forward": lambda: evaluate(dense),
            "bare GEMMs/both": both_gemms,
            "bare GEMMs, ready memory/both": ready_both,
            "MoeMlp, train/both": lambda: training_step(layer, x, d_y),
            "dense Mlp, train/both": lambda: training_step(dense, x, d_y),
        },
        CPU,
        seconds,
    )


def time_growth(case: Case, seconds: float) -> dict[str, Samples]:
    """Eval forward at a quarter to twice the images: the cost is linear in tokens."""
    layer = make_layer(case).eval()
    calls = {}
    for images in (case.images // 4, case.images // 2, case.images, case.images * 2):
        x = tokens(replace(case, images=images)).detach()
        calls[replace(case, images=images).name] = lambda x=x: layer(x)
    with torch.no_grad():
        return measure(calls, CPU, seconds)


def memory_bars(case: Case, x: Tensor, d_y: Tensor) -> list[Limit]:
    """Peak memory of the layer against what its saved tensors, its output and its gradients take."""
    layer = make_layer(case)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    output = y.untyped_storage().nbytes()
    # The input was there before and is no memory of the layer's, but the layer keeps it.
    needed = sum(saved.values()) + output
    gradients = sum(parameter.nbytes for parameter in layer.parameters()) + x.nbytes
    held = x.nbytes
    forward = (held + peak_cpu_memory(lambda: layer(x))) / needed
    both = (held + peak_cpu_memory(lambda: training_step(layer, x, d_y))) / (needed + gradients)
    return [
        Limit("forward: peak memory over saved tensors and output", 1.30, forward, forward, forward),
        Limit("forward + backward: peak memory over saved tensors, output and gradients", 1.30, both, both, both),
    ]


def speed_bars(samples: dict[str, Samples]) -> list[Limit]:
    """Ratios round by round."""
    pairs = (
        ("forward, eval: MoeMlp over its bare GEMMs", 1.10, "MoeMlp, eval/forward", "bare GEMMs/forward"),
        ("forward, train: MoeMlp over its bare GEMMs", 1.10, "MoeMlp, train/forward", "bare GEMMs/forward"),
        ("forward + backward: MoeMlp over its bare GEMMs", 1.15, "MoeMlp, train/both", "bare GEMMs/both"),
        ("forward: MoeMlp over a dense Mlp of its FLOPs", 1.15, "MoeMlp, eval/forward", "dense Mlp, eval/forward"),
        ("forward + backward: the same", 1.15, "MoeMlp, train/both", "dense Mlp, train/both"),
    )
    return [Limit.of(what, limit, samples[ours].over(samples[theirs])) for what, limit, ours, theirs in pairs]


def growth_bar(samples: dict[str, Samples]) -> Limit:
    """Time per token at twice the case's images over that at the case."""
    case, twice = list(samples)[-2:]
    ratio = samples[twice].over(samples[case])
    values = [ratio.quantile(q) / 2 for q in (0.5, 0.2, 0.8)]
    return Limit("forward: time per token at twice the images over that here", 1.10, *values)


def layer_rows(case: Case, samples: dict[str, Samples]) -> list[Row]:
    """Rows with the share of this machine's own matmul rate."""
    square = 2 * 2048**3
    ceiling = Ceiling("matmul 2048^3", square / samples["matmul 2048^3/forward"].median, "flops")
    rows = []
    for name, each in samples.items():
        variant, direction = name.split("/")
        flops = case.mlp_flops * (3 if direction == "both" else 1)
        shape = case.name
        if variant.startswith("matmul"):
            flops, shape = square, "2048^3"
        rows.append(row(OP, direction, shape, variant, each, flops=flops, ceiling=ceiling))
    return rows


def original_lines(rows: list[dict]) -> list[str]:
    """The original's times, and what they are on a machine with this one's matmul."""
    milliseconds = {(each["variant"], each["direction"]): each["median_us"] * 1e-3 for each in reversed(rows)}
    matmul = milliseconds["matmul 2048^3", "forward"]
    lines = [
        f"The original's code was timed where a 2048^3 matmul took {ORIGINAL_MATMUL_MS:.0f} ms; here it takes "
        f"{matmul:.0f} ms. Scaled by that:",
        "",
        "| direction | original's dispatcher | there, ms | scaled, ms | MoeMlp, ms | faster by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for direction, times in ORIGINAL_MS.items():
        ours = milliseconds["MoeMlp, train", direction]
        for dispatcher, there in times.items():
            scaled = there * matmul / ORIGINAL_MATMUL_MS
            lines.append(
                f"| {direction} | {dispatcher} | {there:.0f} | {scaled:.0f} | {ours:.0f} | {scaled / ours:.2f} |"
            )
    return lines


def run_cpu(case: Case, seconds: float) -> dict:
    """Checks, times and weighs the layer; returns what the JSON holds."""
    torch.manual_seed(0)
    x = tokens(case)
    d_y = torch.randn(x.shape)
    require_parity(case, x, d_y)
    samples, growth = time_layer(case, x, d_y, 0.8 * seconds), time_growth(case, 0.2 * seconds)
    bars = [*speed_bars(samples), *memory_bars(case, x, d_y), growth_bar(growth)]
    rows = layer_rows(case, samples)
    rows += [row(OP, "forward", name, "MoeMlp, eval", each) for name, each in growth.items()]
    return {"environment": environment(CPU), "bars": [vars(bar) for bar in bars], "rows": as_dicts(rows)}


def markdown(content: dict) -> list[str]:
    """The results file."""
    return [
        *heading("MoE layer on a CPU, float32", content["environment"]),
        "Checked against the eager reference in the same run: output and every gradient within 1e-5. Ratios are",
        "medians over rounds (20%..80%); bare GEMMs are torch.bmm calls at all E * R rows;\n"
        "a row below has them writing into memory that is there already.",
        "",
        *limit_table(content["bars"]),
        "",
        *original_lines(content["rows"]),
        "",
        *table(content["rows"]),
    ]


def main(arguments: list[str] | None = None) -> Path:
    """Writes the results; returns the path of the Markdown."""
    parser = command_line(__doc__, threads=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on timed runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return publish(options.out / machine_name(CPU), "layer_on_cpu", run_cpu(CPU_LAYER, options.seconds), markdown)


if __name__ == "__main__":
    main()
