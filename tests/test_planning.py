"""What the plan says is what a run holds and moves: parameters on 64 fake ranks, activations and bytes on two real."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vmoe_torch
from tests.parallel.processes import run
from vmoe_torch.cli import main
from vmoe_torch.parallel import PlannedRun, build_mesh, changes_that_fit, describe, parallelize, plan

IMAGES, CAPACITY = 4, 0.7


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank's all-to-alls send to other ranks."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            rows, ranks = args[0], dist.get_world_size()
            self.calls += 1
            self.bytes += rows.numel() * rows.element_size() * (ranks - 1) // ranks
        return function(*args, **(kwargs or {}))


def _model(**kwargs):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    return vmoe_torch.VMoE(**{**options, "num_experts": 4, "group_size": 2, "capacity_factor": CAPACITY, **kwargs})


def held_after(model, x, y, autocast):
    """Bytes that autograd keeps at the end of a forward, each storage once, parameters not counted; and the wire."""
    held = {}

    def keep(tensor):
        if not isinstance(tensor, DTensor):
            storage = tensor.untyped_storage()
            # The tensor stays referenced, so that no other can get its address.
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    wire = Wire()
    with wire:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
        forward = wire.bytes, wire.calls
        # The gathered ones, which FSDP leaves in the modules here.
        locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        weights = {local.untyped_storage().data_ptr() for local in locals_}
        size = sum(nbytes for pointer, (nbytes, _) in held.items() if pointer not in weights)
        loss.backward()
    return size, forward, (wire.bytes, wire.calls)


def _compare(dtype, chunks, kwargs, autocast=False):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = _model(**kwargs)
    size = torch.empty((), dtype=dtype).element_size()
    settings = PlannedRun(world, world, IMAGES * world, compute_bytes=size, wire_bytes=2, autocast=autocast)
    want = plan(model, settings)
    # Gathered parameters stay, so that what autograd keeps of them can be told from activations.
    options = {"wire_dtype": torch.bfloat16, "chunks": chunks, "reshard_after_forward": False}
    parallelize(model, build_mesh(1, world, "cpu"), param_dtype=None if autocast else dtype, **options)
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.zeros(IMAGES, dtype=torch.long)
    held, (forward, calls), (step, all_calls) = held_after(model, x, y, autocast)

    assert abs(held / want.activations - 1) <= 0.02, f"activations: held {held}, planned {want.activations}"
    # The layer's formula, by hand: 2 * E * G * C * D * (R - 1) / R * 2 bytes.
    group = 2 * 65
    capacity = -(-int(-(-group * model.blocks[1].mlp.num_selected_experts * CAPACITY // 4)) // 4) * 4
    by_hand = 2 * 4 * (IMAGES // 2) * capacity * 32 * (world - 1) // world * 2
    layers = len(vmoe_torch.moe_layers(model))
    assert layers == 2
    assert want.exchange_per_layer == by_hand
    assert forward == layers * by_hand
    assert calls == layers * 2 * chunks
    assert (step, all_calls) == (want.exchange_per_step, 2 * calls)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    mine = sum(parameter.to_local().numel() for parameter in model.parameters()) * 4
    largest = torch.tensor(mine)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    assert largest == want.parameters


def _compare_all():
    _compare(torch.float32, 1, {})
    _compare(torch.float32, 2, {"num_selected_experts": 1, "init_values": 0.1})
    _compare(torch.bfloat16, 1, {})
    # As `vmoe train` computes.
    _compare(torch.bfloat16, 1, {"representation_size": True}, autocast=True)
    _compare(torch.float32, 1, {"shared_expert_hidden": 0.5})
    _compare(torch.bfloat16, 1, {"shared_expert_hidden": 0.5}, autocast=True)


def test_plan_is_what_two_ranks_hold_and_move(tmp_path):
    run(2, tmp_path, _compare_all)


@pytest.fixture
def fake_ranks():
    """A process group of 64 ranks of which this process is the first, and which sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def large():
    """The 15-billion-parameter model without weights."""
    with torch.device("meta"):
        return timm.create_model("vmoe_15b")


@pytest.mark.parametrize(("dp", "ep"), [(2, 32), (8, 8)])
def test_plan_of_15b_is_what_64_ranks_hold(fake_ranks, dp, ep):
    with torch.device("meta"):
        model = timm.create_model("vmoe_15b")
    want = plan(model, PlannedRun(64, ep, 1024))
    parallelize(model, build_mesh(dp, ep, "cpu"))
    held = sum(parameter.to_local().numel() * 4 for parameter in model.parameters())
    assert all(parameter.to_local().is_meta for parameter in model.parameters())
    assert abs(want.parameters / held - 1) <= 0.01
    assert (want.gradients, want.optimizer) == (want.parameters, 2 * want.parameters)


def test_plan_counts_the_matrix_products_of_a_forward():
    model = _model(representation_size=True, noise_std=0.0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(IMAGES, 3, 32, 32))
    planned = plan(model, PlannedRun(1, 1, IMAGES)).flops_per_step
    assert planned == 3 * counter.get_total_flops()


def test_plan_names_changes_that_fit(large):
    tight = PlannedRun(8, 8, 1024, gpu="a100")
    result = plan(large, tight)
    assert not result.fits
    changes = changes_that_fit(large, tight)
    assert changes
    assert all(change.fits for _, change in changes)
    text = describe(result, changes)
    assert "does not fit" in text
    assert all(name in text for name, _ in changes)
    loose = plan(large, PlannedRun(64, 32, 1024))
    assert loose.fits
    assert "fits:" in describe(loose, [])


def test_plan_command_prints_the_table(capsys):
    assert main(["plan", "vmoe_15b", "--gpus", "64", "--ep", "32", "--gpu", "h200", "--batch-size", "1024"]) == 0
    out = capsys.readouterr().out
    assert "64 x h200, dp=2, ep=32" in out
    assert "all-to-all per layer" in out
    assert main(["plan", "vmoe_15b", "--gpus", "64", "--ep", "48", "--batch-size", "1024"]) == 2
    assert "ep must divide" in capsys.readouterr().err
    for other in ("resnet18", "vit_base_patch16_224", "beit_base_patch16_224"):
        assert main(["plan", other, "--gpus", "8", "--ep", "8", "--batch-size", "1024"]) == 2
        assert "the model must be a VMoE, got" in capsys.readouterr().err
    assert main(["plan", "vmoe_99b", "--gpus", "8", "--ep", "8", "--batch-size", "1024"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PlannedRun(0, 1, 1024), "gpus must be at least 1, got 0"),
        (PlannedRun(1.0, 1, 1024), r"gpus must be at least 1, got 1\.0"),
        (PlannedRun(64, 48, 1024), "ep must divide the number of GPUs, got ep=48 and gpus=64"),
        (PlannedRun(64, 64, 1024), "ep must divide num_experts=32, got ep=64"),
        (PlannedRun(64, 32, 1000), "batch must be a positive multiple of gpus=64, got 1000"),
        (PlannedRun(64, 32, 1024, gpu="v100"), "gpu must be one of a100, h100, h200, b200, got 'v100'"),
    ],
)
def test_plan_refuses_what_cannot_run(large, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(large, settings)
