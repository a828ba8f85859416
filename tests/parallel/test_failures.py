"""Every rank runs every collective whatever its tokens do, and a rank that fails tells the others why."""

import contextlib
import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import vmoe_kernels
import vmoe_torch
from tests.parallel.processes import run, start, wait
from tests.test_planning import Wire
from vmoe_kernels import assign_slots
from vmoe_torch.parallel import ExpertExchange, build_mesh, parallelize, shared_errors

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
    return torch.full_like(assign_slots(*args, **kwargs), -1)


def _refusals():
    mesh = build_mesh(1, 2, "cpu")
    with pytest.raises(ValueError, match="the model must be on one device, got one that is parallelised already"):
        parallelize(_model(), mesh)
    with pytest.raises(ValueError, match="the model must have blocks, got Linear"):
        parallelize(torch.nn.Linear(1, 1), mesh)
    with pytest.raises(ValueError, match="ranks_per_node must divide the 2 ranks of the experts, got -1"):
        ExpertExchange(dist.group.WORLD, ranks_per_node=-1)


def _timeouts(want):
    """Every group that ranks exchange over gives up when the group of all does, not after torch's default."""
    inside, between, _ = ExpertExchange(dist.group.WORLD, ranks_per_node=2).levels
    for group in (*build_mesh(2, 2, "cpu").get_all_groups(), inside, between):
        assert group.size() == 2
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == want


def test_groups_of_some_ranks_keep_the_timeout(tmp_path):
    run(4, tmp_path, _timeouts, PATIENCE, timeout=PATIENCE)


def _drops():
    """Rank 0 drops all its tokens, rank 1 most of its own: both run the same collectives, and all gradients agree."""
    model = _model()
    rank = dist.get_rank()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    calls = []
    for all_dropped in (False, True):
        if all_dropped and rank == 0:
            vmoe_kernels.assign_slots = _drop_everything
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


def _drops_and_refusals():
    # In one set of processes.
    _drops()
    _refusals()


def test_ranks_that_drop_all_tokens_run_every_collective(tmp_path):
    run(2, tmp_path, _drops_and_refusals)


def _fail(folder, who, way):
    """One rank raises, dies, or stops answering before its second step; what each of them ends with is left."""
    model = _model()
    x = torch.randn(2, 3, 16, 16)
    rank = dist.get_rank()
    try:
        with shared_errors():
            _step(model, x)
            began = time.monotonic()
            if rank == who and way == "raises":
                raise KeyError("no such image")
            if rank == who and way == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == who:
                time.sleep(PATIENCE)
            _step(model, x)
    except Exception as error:
        cause = error.__cause__
        (folder / f"rank-{rank}").write_text(f"{time.monotonic() - began}|{type(error).__name__}: {error}|{cause}")
        raise


@pytest.mark.parametrize(
    ("who", "way", "reason"),
    [
        (1, "raises", "RankError: rank 1 failed: KeyError: 'no such image'"),
        (0, "raises", "RankError: rank 0 failed: KeyError: 'no such image'"),
        (1, "dies", "RankError: rank 1 gives no sign of life: hanging, or killed"),
        (0, "hangs", "RankError: rank 0 gives no sign of life: hanging, or killed"),
    ],
)
def test_rank_that_fails_ends_the_others_with_its_error(tmp_path, who, way, reason):
    context = start(2, tmp_path, _fail, tmp_path, who, way, timeout=TIMEOUT)
    failing, other = context.processes[who], context.processes[1 - who]
    other.join(PATIENCE)
    # It ended by itself, with the other's error, soon after that one failed.
    assert other.exitcode == 1
    waited, error, cause = (tmp_path / f"rank-{1 - who}").read_text().split("|")
    assert float(waited) < 2 * TIMEOUT
    assert error == reason
    assert re.search("Timed out" if way == "hangs" else "(closed|reset) by peer|Broken pipe", cause), cause
    if way == "raises":
        failing.join(PATIENCE)
        assert (tmp_path / f"rank-{who}").read_text().split("|")[1] == "KeyError: 'no such image'"
    with pytest.raises((mp.ProcessRaisedException, mp.ProcessExitedException)):
        wait(context)
    assert not any(process.is_alive() for process in context.processes)


def _twice():
    """An error of an earlier block is no news in a later one; other errors of one rank pass as they are."""
    with contextlib.suppress(ValueError), shared_errors():
        raise ValueError("everybody's")
    with shared_errors():
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value == dist.get_world_size()


def test_errors_of_an_earlier_block_are_forgotten(tmp_path):
    run(2, tmp_path, _twice)
    with pytest.raises(KeyError), shared_errors():
        raise KeyError("without a group")
