"""What spreading the experts over processes costs: a MoE layer's forward and backward with the experts of every process
at home, and with each process holding its share of them and rows going to and fro by all-to-all.

Every process has a thread and its own images, so perfect spreading costs as much on N processes as on 1. gloo on this
machine: what is measured is the exchange's work, not a network.
"""

import datetime
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.harness.cases import CPU_LAYER, Case
from benchmarks.harness.protocol import Samples, relative_error, with_gradients
from benchmarks.harness.session import Session
from benchmarks.layer.on_cpu import make_layer, tokens
from vmoe_torch.layers import MoeMlp
from vmoe_torch.parallel import ExpertExchange

OP = "ranks"
RANKS = (1, 2, 4)
ROUNDS = 10
HOME, SPREAD = "experts at home", "experts spread"


def run(session: Session) -> None:
    """Groups of processes, one after the other; both ways in turn within each."""
    if session.device.type != "cpu":
        return
    case = replace(CPU_LAYER, images=16)
    for count in RANKS:
        if not session.begin(f"{OP} {count}"):
            return
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, args=(count, folder, case), nprocs=count)
            times: dict[str, list[float]] = torch.load(Path(folder) / "times.pt")
        samples = {name: Samples(tuple(seconds)) for name, seconds in times.items()}
        for name, each in samples.items():
            session.sweeps.setdefault(f"ranks, {name}", {})[count] = each
        session.add(OP, "both", f"N={count}, {case.name} each", samples)


def _process(rank: int, count: int, folder: str, case: Case) -> None:
    # torch's own deprecations inside its distributed packages.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=wait)
    try:
        times = _measure(rank, count, case)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        torch.save(times, Path(folder) / "times.pt")


def _measure(rank: int, count: int, case: Case) -> dict[str, list[float]]:
    """Seconds per step of the slowest process, by name, in order of rounds."""
    home, spread = make_layer(case), spread_layer(make_layer(case), rank, count)
    torch.manual_seed(rank)
    x = tokens(case)
    d_y = torch.randn(x.shape)
    _require_parity(home, spread, x, d_y, rank, count)
    layers = {HOME: home, SPREAD: spread}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(ROUNDS):
        for name, layer in layers.items():
            dist.barrier()
            start = time.perf_counter()
            _step(layer, x, d_y)
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            times[name].append(seconds.item())
    return times


def spread_layer(layer: MoeMlp, rank: int, count: int) -> MoeMlp:
    """Keeps the rank's share of the experts and sends rows to where their experts are."""
    for linear in (layer.fc1, layer.fc2):
        for name, parameter in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(parameter.detach().chunk(count)[rank].clone()))
    layer.exchange = ExpertExchange(dist.group.WORLD)
    return layer


def _step(layer: MoeMlp, x: Tensor, d_y: Tensor) -> dict[str, Tensor]:
    return with_gradients(lambda: layer(x), {"x": x, **dict(layer.named_parameters())}, d_y)


def _require_parity(home: MoeMlp, spread: MoeMlp, x: Tensor, d_y: Tensor, rank: int, count: int) -> None:
    """Output and every gradient of the spread layer are those of the other; an expert's are summed over processes."""
    want, got = _step(home, x, d_y), _step(spread, x, d_y)
    for name, tensor in want.items():
        if name.startswith("d_fc"):
            dist.all_reduce(tensor)
            tensor = tensor.chunk(count)[rank]
        error = relative_error(got[name], tensor)
        if not error <= 1e-5:
            raise RuntimeError(f"{name} must be within 1e-5 of the unspread layer's, got {error:.1e}: nothing is timed")
