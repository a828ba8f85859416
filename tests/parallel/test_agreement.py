"""What ranks must have alike is made so or told by the same error on all of them; 2 processes for everything here."""

import copy
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint import FileSystemWriter

import vmoe_kernels
import vmoe_torch
from tests.parallel.processes import run, start
from vmoe_torch.parallel import (
    ShardedCheckpoints,
    build_mesh,
    full_state_dict,
    materialize,
    on_first,
    parallelize,
    require_same,
)

TIMEOUT = 10.0


def _model(**kwargs):
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = vmoe_torch.VMoE(**{**options, "num_experts": 4, "group_size": 1, "noise_std": 0.0, **kwargs})
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def _same_everywhere(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(other, everyone[0]) for other in everyone)


def _weights_come_from_the_first_rank():
    torch.manual_seed(dist.get_rank())
    model = _model()
    model.register_buffer("seen", torch.full((3,), dist.get_rank(), dtype=torch.int64))
    mine = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not _same_everywhere(mine["blocks.1.mlp.router.weight"])
    parallelize(model, build_mesh(1, 2, "cpu"))
    spread = full_state_dict(model, keep=True)
    for name, tensor in mine.items():
        dist.broadcast(tensor, 0)
        assert torch.equal(spread[name], tensor), name
    x = torch.randn(2, 3, 16, 16)
    dist.broadcast(x, 0)
    assert _same_everywhere(model(x).detach())


def _what_differs_is_named():
    rank = dist.get_rank()
    mesh = build_mesh(1, 2, "cpu")
    model = parallelize(_model(), mesh)
    same = r"must be the same on all ranks in every forward, got {} on rank 0 and {} on rank 1"
    for images, got in (((2, 1), (2, 1)), ((0, 2), (0, 2))):
        shapes = (rf"\({number}, 3, 16, 16\)" for number in got)
        with pytest.raises(ValueError, match="the images' shape " + same.format(*shapes)):
            model(torch.randn(images[rank], 3, 16, 16))
    for name, values in (("num_selected_experts", (1, 2)), ("capacity_factor", (1.05, 0.5))):
        before = getattr(model.blocks[1].mlp, name)
        vmoe_torch.set_routing(model, **{name: values[rank]})
        with pytest.raises(ValueError, match=rf"blocks.1.mlp.{name} " + same.format(*values)):
            model(torch.randn(2, 3, 16, 16))
        vmoe_torch.set_routing(model, **{name: before})
    model.train(rank == 0)
    with pytest.raises(ValueError, match="model.training " + same.format(True, False)):
        model(torch.randn(2, 3, 16, 16))
    # Nothing is out of step afterwards.
    model.train()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    with pytest.raises(ValueError, match="chunks must be the same on all ranks, got 1 on rank 0 and 2 on rank 1"):
        parallelize(_model(), mesh, chunks=rank + 1)
    with pytest.raises(ValueError, match=r"cls_token must be .*got \(\(1, 1, 32\), .* on rank 0 and \(\(1, 1, 64\)"):
        parallelize(_model(embed_dim=32 * (rank + 1)), mesh)
    with pytest.raises(ValueError, match=r"num_selected_experts must be .* got 1 on rank 0 and 2 on rank 1"):
        parallelize(_model(num_selected_experts=rank + 1), mesh)
    with pytest.raises(ValueError, match="seed must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"):
        materialize(parallelize(_model(), mesh), seed=rank)


def _a_model_that_is_refused_keeps_its_weights():
    rank, mesh = dist.get_rank(), build_mesh(1, 2, "cpu")
    for options, arguments, message in (
        ({"num_experts": 3}, {}, "ep must divide num_experts=3, got ep=2"),
        ({"capacity_factor": "dropless"}, {}, "capacity_factor must be a number with expert parallelism"),
        ({}, {"chunks": 0}, "chunks must be at least 1, got 0"),
    ):
        model = _model(**options)
        torch.nn.init.constant_(model.head.weight, rank)
        with pytest.raises(ValueError, match=message):
            parallelize(model, mesh, **arguments)
        assert (model.head.weight == rank).all()


def _first_speaks_for_all():
    require_same({"a": 1})
    assert on_first(lambda: dist.get_rank()) == 0

    def fails():
        raise FileNotFoundError("no such file")

    with pytest.raises(OSError, match="no such file"):
        on_first(fails)


def _empty_batches_pass():
    for options in ({}, {"chunks": 2, "recompute": True}):
        model = parallelize(_model(), build_mesh(1, 2, "cpu"), **options)
        out = model(torch.randn(0, 3, 16, 16))
        assert out.shape == (0, 5)
        out.sum().backward()


def _auxiliary_loss_alone_has_a_backward():
    torch.manual_seed(0)
    single = _model(auxiliary_mode="manual", depth=4)
    x = torch.randn(4, 3, 16, 16)
    single(x)
    vmoe_torch.auxiliary_loss(single).backward()
    spread = parallelize(copy.deepcopy(single), build_mesh(1, 2, "cpu"))
    spread.zero_grad()
    spread(x[2 * dist.get_rank() :][:2])
    vmoe_torch.auxiliary_loss(spread).backward()
    got = {name: parameter.grad.full_tensor() for name, parameter in spread.named_parameters()}
    for name, parameter in single.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-6, msg=name)
    assert got["blocks.1.mlp.router.weight"].abs().max() > 1e-5


def _routers_are_not_rounded():
    torch.manual_seed(0)
    model = _model()
    want = model.blocks[1].mlp.router.weight.detach().clone()
    parallelize(model, build_mesh(1, 2, "cpu"), param_dtype=torch.bfloat16)
    router, seen = vmoe_kernels.router, []

    def scored(tokens, weight, **kwargs):
        seen.append((tokens.dtype, weight.detach().clone()))
        return router(tokens, weight, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vmoe_kernels, "router", scored)
        F.cross_entropy(model(torch.randn(2, 3, 16, 16)).float(), torch.zeros(2, dtype=torch.long)).backward()
    ((dtype, weight),) = seen
    assert dtype == torch.bfloat16
    assert torch.equal(weight, want)
    gradient = model.blocks[1].mlp.router.weight.grad
    assert gradient.dtype == torch.float32
    assert _same_everywhere(gradient.to_local())


def _load_waits_for_save(folder):
    torch.manual_seed(0)
    model = parallelize(_model(), build_mesh(1, 2, "cpu"))
    optimizer = torch.optim.SGD(model.parameters())
    checkpoints = ShardedCheckpoints(folder / "checkpoints", keep=1)
    write = FileSystemWriter.write_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", lambda *args: time.sleep(1) or write(*args))
        checkpoints.save(1, model, optimizer, {"update": 1})
        assert checkpoints.load(model, optimizer) == {"update": 1}
        checkpoints.save(2, model, optimizer, {"update": 2})
        assert [path.name for path in checkpoints.usable()] == ["update_00000002"]


def _all(folder):
    _weights_come_from_the_first_rank()
    _what_differs_is_named()
    _a_model_that_is_refused_keeps_its_weights()
    _first_speaks_for_all()
    _empty_batches_pass()
    _auxiliary_loss_alone_has_a_backward()
    _routers_are_not_rounded()
    _load_waits_for_save(folder)


def test_two_ranks_agree(tmp_path):
    run(2, tmp_path, _all, tmp_path)


def _stuck_disk(folder, stuck):
    """One rank's disk does not answer: all ranks say whose, within the timeout, and end."""
    rank = dist.get_rank()
    model = torch.nn.Linear(2, 2)
    checkpoints = ShardedCheckpoints(folder / "checkpoints", keep=1)
    if rank == stuck:
        FileSystemWriter.write_data = lambda *_: threading.Event().wait()
    checkpoints.save(1, model, torch.optim.SGD(model.parameters()), {})
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"the disk of rank {stuck} does not answer within {TIMEOUT:g} s"):
        checkpoints.wait()
    assert time.monotonic() - began < 2 * TIMEOUT
    (folder / f"rank{rank}").touch()


@pytest.mark.parametrize("stuck", [0, 1])
def test_stuck_disk_is_named_within_the_timeout(stuck, tmp_path):
    context = start(2, tmp_path, _stuck_disk, tmp_path, stuck, timeout=TIMEOUT)
    for process in context.processes:
        process.join(120)
        assert process.exitcode is not None
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
