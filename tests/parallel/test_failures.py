"""Every rank runs every collective whatever its tokens do, and a rank that fails takes the others with it."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import vmoe_kernels
import vmoe_torch
from tests.parallel.processes import enter, run
from tests.parallel.test_plan import Wire
from vmoe_kernels import route
from vmoe_torch.parallel import build_mesh, parallelize

TIMEOUT = 20.0  # seconds; it also bounds how far apart two processes may start on a busy machine
PATIENCE = 120.0


def _model():
    torch.manual_seed(0)
    model = vmoe_torch.VMoE(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        class_token=False,
        global_pool="avg",
        num_experts=4,
        num_selected_experts=1,
        capacity_factor=0.1,
        capacity_multiple_of=1,
        group_size="batch",
        noise_std=0.0,
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return parallelize(model, build_mesh(1, dist.get_world_size(), "cpu"))


def _step(model, x):
    model.zero_grad()
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def _drop_everything(*args, **kwargs):
    routing = route(*args, **kwargs)
    return routing._replace(slots=torch.full_like(routing.slots, -1))


def _drops():
    """Rank 0 drops all its tokens, rank 1 most of its own: both run the same collectives, and all gradients agree."""
    model = _model()
    rank = dist.get_rank()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    calls = []
    for all_dropped in (False, True):
        if all_dropped and rank == 0:
            vmoe_kernels.route = _drop_everything
        with Wire() as wire:
            _step(model, x)
        calls.append((wire.calls, wire.bytes))
        slots = model.blocks[1].mlp.record.slots
        kept = (slots >= 0).float().mean().item()
        assert kept == 0 if all_dropped and rank == 0 else 0 < kept < 0.5
    assert calls[0] == calls[1]
    assert calls[0][0] == 4
    everyone = [None, None]
    dist.all_gather_object(everyone, calls)
    assert everyone[0] == everyone[1]
    gradient = model.blocks[1].mlp.fc1.weight.grad.full_tensor()
    assert gradient.isfinite().all()
    # Rank 1's tokens still teach.
    assert gradient.abs().sum() > 0


def test_ranks_that_drop_all_tokens_run_every_collective(tmp_path):
    run(2, tmp_path, _drops)


def _fail(folder, way):
    """The second rank raises, or stops answering, before its second step."""
    model = _model()
    x = torch.randn(2, 3, 16, 16)
    _step(model, x)
    rank, began = dist.get_rank(), time.monotonic()
    try:
        if rank == 1 and way == "raises":
            raise RuntimeError("rank 1 has failed")
        if rank == 1:
            time.sleep(PATIENCE)
            os._exit(7)
        _step(model, x)
    finally:
        (folder / f"waited-{rank}").write_text(str(time.monotonic() - began))


@pytest.mark.parametrize("way", ["raises", "hangs"])
def test_rank_that_fails_ends_the_others(tmp_path, way):
    meeting = tmp_path / "meeting"
    context = mp.start_processes(
        enter, (2, str(meeting), _fail, (tmp_path, way), TIMEOUT), nprocs=2, join=False, start_method="spawn"
    )
    first = context.processes[0]
    first.join(PATIENCE)
    # It ended by itself, with an error, soon after the other failed.
    assert first.exitcode == 1
    assert float((tmp_path / "waited-0").read_text()) < 2 * TIMEOUT
    error = "Connection (closed|reset) by peer" if way == "raises" else "Timed out"
    with pytest.raises(mp.ProcessRaisedException, match=error):
        _join(context)
    assert not any(process.is_alive() for process in context.processes)


def _join(context):
    while not context.join():
        continue
