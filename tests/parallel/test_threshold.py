"""Threshold routing on two processes: experts spread over them, and moving averages that start and stay alike."""

import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vmoe_torch
from tests.parallel.processes import run
from vmoe_torch.parallel import build_mesh, full_state_dict, materialize, parallelize, share_thresholds


def _model(**kwargs):
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    options |= {"num_experts": 4, "group_size": 1, "noise_std": 0.0, "router": "threshold", **kwargs}
    model = vmoe_torch.VMoE(**options)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def _trains_as_on_one_device():
    model = _model(mean_selected_experts=1.4)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    own = images.chunk(2)[dist.get_rank()]
    plain = copy.deepcopy(model)
    want = plain(images)
    want.square().sum().div(2).backward()
    parallelize(model, build_mesh(1, 2, "cpu"))
    y = model(own)
    torch.testing.assert_close(y, want.chunk(2)[dist.get_rank()], rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    layer, twin = model.blocks[1].mlp, plain.blocks[1].mlp
    assert layer.record.selected.sum() == 2 * round(17 * 1.4)
    torch.testing.assert_close(layer.fc1.weight.grad.full_tensor(), twin.fc1.weight.grad, rtol=1e-4, atol=1e-5)
    assert layer.router.thresholds.any()
    kept = full_state_dict(model, keep=True)
    assert kept["blocks.1.mlp.router.thresholds"].shape == twin.router.thresholds.shape
    with torch.no_grad():
        assert model.eval()(own).isfinite().all()


def _begins_on_the_meta_device():
    with torch.device("meta"):
        model = _model(mean_selected_experts=1.4)
    materialize(parallelize(model, build_mesh(1, 2, "cpu")), seed=3)
    assert not model.blocks[1].mlp.router.thresholds.any()
    assert model(torch.zeros(1, 3, 16, 16)).isfinite().all()


def _tables(model):
    return torch.stack([layer.own_router().thresholds for layer in vmoe_torch.moe_layers(model).values()])


def _everyone_s(table):
    tables = [torch.empty_like(table) for _ in range(2)]
    dist.all_gather(tables, table)
    return tables


def _averages_are_of_all_images(distribute):
    """Moving averages are linear: they are the means of those that each process would have of its own images."""
    model = _model(mean_selected_experts=1.4, moe_layers="every1")
    alone, model = copy.deepcopy(model), distribute(model)
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    for step in range(3):
        images = (1 + step) * torch.randn(4, 3, 16, 16, generator=generator)
        for each in (alone, model):
            each(images).square().sum().backward()
            each.zero_grad()
        first, second = _everyone_s(_tables(alone))
        assert not torch.allclose(first, second, rtol=1e-3)
        torch.testing.assert_close(_tables(model), (first + second) / 2)
        ours = _everyone_s(_tables(model))
        assert torch.equal(*ours)
    # Inference finds nothing, and says nothing to others.
    before = _tables(model.eval())
    with torch.no_grad():
        model(images)
    assert torch.equal(_tables(model), before)


def _parallelized(model):
    return parallelize(model, build_mesh(2, 1, "cpu"))


def _replicated(model):
    return share_thresholds(DistributedDataParallel(model))


def _spread_over_both(model):
    return parallelize(model, build_mesh(1, 2, "cpu"), recompute=True)


def _both():
    _trains_as_on_one_device()
    _begins_on_the_meta_device()
    for distribute in (_parallelized, _replicated, _spread_over_both):
        _averages_are_of_all_images(distribute)


def test_two_processes(tmp_path):
    run(2, tmp_path, _both)
