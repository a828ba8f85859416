"""Searches launch configs on this GPU and prints table entries to paste; nothing uses them until someone does.

    python -m benchmarks.compile.tune [OP ...] [--case N] [--seconds 2]

Every candidate of a kernel's launch table runs through the public op that uses it, is checked against the table's own
config, and is timed in turn with it. Writes benchmarks/results/<gpu>/tune.json.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

import vmoe_kernels as kernels
from benchmarks.harness.cases import LAYERS, Case, Layer
from benchmarks.harness.protocol import measure, relative_error, with_gradients
from benchmarks.harness.results import command_line, environment, heading, machine_name, write
from benchmarks.harness.session import first_line
from vmoe_kernels.common import launch

Results = dict[str, Tensor]
# Candidates sum in other orders, so they agree to rounding only.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def workloads(layer: Layer) -> dict[str, Callable[[], Results]]:
    """Calls that use the kernels, the most specific first; a table is tuned in the first call that reads it."""
    case, routing = layer.case, layer.routing
    settings = {"num_selected_experts": case.num_selected, "group_size": case.group_size}
    places = {"num_experts": case.num_experts, "group_size": case.group_size, "capacity": case.capacity}
    gates, d_rows = routing.gates, torch.randn_like(layer.buffer)
    d_gates = torch.randn_like(gates)

    def differentiated(call: Callable[..., Tensor], cotangent: Tensor, **inputs: Tensor) -> Callable[[], Results]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        return lambda: with_gradients(lambda: call(**leaves), leaves, cotangent)

    return {
        "router": differentiated(
            lambda x, weight: kernels.router(x, weight, **settings).gates, d_gates, x=layer.x, weight=layer.router
        ),
        # Only which choices are kept is defined, so that is what must agree.
        "slots": lambda: {
            "kept": (kernels.assign_slots(routing.experts, gates, batch_priority=True, **places) >= 0).float()
        },
        "dispatch": differentiated(
            lambda x: kernels.dispatch(x, routing.slots, case.num_rows), d_rows.flatten(0, 1), x=layer.x
        ),
        "combine": differentiated(
            lambda buffer, gates: kernels.combine(buffer, routing.slots, gates),
            layer.d_y,
            buffer=layer.buffer.flatten(0, 1),
            gates=gates,
        ),
        "expert_mlp": differentiated(kernels.expert_mlp, d_rows, x=layer.buffer, **layer.weights),
        "moe_mlp": differentiated(
            lambda x, gates, **weights: kernels.moe_mlp(x, routing.slots, gates, **weights, rows_per_expert=case.rows),
            layer.d_y,
            x=layer.x,
            gates=gates,
            **layer.weights,
        ),
    }


def search(
    calls: dict[str, Callable[[], Results]],
    device: torch.device,
    *,
    ops: list[str] | None = None,
    seconds: float = 2.0,
    tolerance: float = 2e-2,
) -> Iterator[dict]:
    """Tunes every table that the calls read.

    Args:
        calls: workload name to a call that returns its results by name.
        device: where they run.
        ops: tables to tune; None is all.
        seconds: of timed runs per table.
        tolerance: relative error allowed against the config that the table gives today.

    Yields:
        Per table: the key and config to paste, its time and that of today's config, and what was left out and why.
    """
    done: set[tuple[str, str]] = set()
    for workload, call in calls.items():
        with launch.recording() as seen:
            want = call()
        for op, bucket in dict.fromkeys(seen):
            if (op, bucket) in done or (ops is not None and op not in ops):
                continue
            done.add((op, bucket))
            yield _tune(op, bucket, workload, call, want, device, seconds, tolerance)


def _tune(
    op: str,
    bucket: str,
    workload: str,
    call: Callable[[], Results],
    want: Results,
    device: torch.device,
    seconds: float,
    tolerance: float,
) -> dict:
    today = launch.look_up(op, device, bucket)
    timed, configs, left_out = {}, {}, []
    for number, config in enumerate(launch.candidates(op)):
        try:
            with launch.override(op, config):
                got = call()
            worst = max(relative_error(got[name], want[name]) for name in want)
            if not worst <= tolerance:
                raise RuntimeError(f"results are off by {worst:.1e}")
        except Exception as error:  # A config may not fit this chip: left out, and said so.
            left_out.append({"config": dataclasses.asdict(config), "why": first_line(error)})
            continue
        configs[str(number)] = config
        timed[str(number)] = _overridden(op, config, call)
    samples = measure(timed, device, seconds)
    times = {name: each.median * 1e6 for name, each in samples.items()}
    best = min(times, key=times.get)
    current = next((times[name] for name, config in configs.items() if config == today), None)
    return {
        "op": op,
        "key": [launch.device_kind(device), launch.triton_version(), bucket],
        "config": dataclasses.asdict(configs[best]),
        "microseconds": times[best],
        "today": dataclasses.asdict(today),
        "today_microseconds": current,
        "workload": workload,
        "all": [{"config": dataclasses.asdict(configs[name]), "microseconds": time} for name, time in times.items()],
        "left_out": left_out,
    }


def _overridden(op: str, config: launch.Config, call: Callable[[], Results]) -> Callable[[], Results]:
    def run() -> Results:
        with ExitStack() as stack:
            stack.enter_context(launch.override(op, config))
            return call()

    return run


def line(found: dict) -> str:
    """A table entry to paste, with the measurement that chose it."""
    config = found["config"]
    options = ", ".join(f"{name}={value}" for name, value in config.items() if name != "constexprs")
    before = found["today_microseconds"]
    was = "today's config failed" if before is None else f"{before:.1f} us today"
    return (
        f"{found['op']}: {tuple(found['key'])}: Config({config['constexprs']}, {options}),"
        f"  # {found['workload']}: {found['microseconds']:.1f} us, {was}"
    )


def write_found(found: list[dict], case: Case, dtype: str, device: torch.device, folder: Path) -> Path:
    """Writes what was found so far; returns the path."""
    made = environment(device)
    lines = [*heading(f"Launch configs, {case.name}, {dtype}", made), *(f"    {line(each)}" for each in found)]
    content = {"environment": made, "case": case.name, "dtype": dtype, "found": found}
    return write(folder / machine_name(device), "tune", content, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    parser.add_argument("ops", nargs="*", metavar="OP", help="launch tables to tune (default: all)")
    parser.add_argument("--case", type=int, default=0, choices=range(len(LAYERS)), help="index of cases.LAYERS")
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed runs per table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m benchmarks.compile.tune needs a CUDA device", file=sys.stderr)
        return 1
    unknown = sorted(set(options.ops) - set(launch.registered_ops()))
    if unknown:
        print(f"OP must be among {launch.registered_ops()}, got {unknown}", file=sys.stderr)
        return 1
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)
    case: Case = LAYERS[options.case]
    layer = Layer(case, device, dtype)
    found = []
    for each in search(
        workloads(layer), device, ops=options.ops or None, seconds=options.seconds, tolerance=TOLERANCE[dtype]
    ):
        print(line(each), flush=True)
        found.append(each)
        write_found(found, case, options.dtype, device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
