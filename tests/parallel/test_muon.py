"""Muon over parameters that lie on several processes updates them as on one."""

import copy

import pytest
import torch
import torch.distributed as dist

import vmoe_torch
from tests.parallel.processes import run
from vmoe_torch.parallel import build_mesh, parallelize
from vmoe_torch.train import create_muon


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _compare(dp, ep):
    torch.manual_seed(0)
    single = vmoe_torch.VMoE(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, num_experts=4, group_size=1
    )
    spread = parallelize(copy.deepcopy(single), build_mesh(dp, ep, "cpu"))
    before = {name: each.detach().clone() for name, each in single.named_parameters()}
    optimizers = [create_muon(model, lr=0.01, weight_decay=0.1) for model in (single, spread)]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        gradients = {name: torch.randn(each.shape, generator=generator) for name, each in single.named_parameters()}
        for model in (single, spread):
            for name, parameter in model.named_parameters():
                gradient = gradients[name]
                if hasattr(parameter, "full_tensor"):
                    gradient = dist.tensor.distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    want = dict(single.named_parameters())
    for name, parameter in spread.named_parameters():
        # The products are in bfloat16, and summed in another order.
        error = (_whole(parameter) - want[name]).norm() / (want[name] - before[name]).norm()
        assert error < 0.05, f"{name}: {error:.2e}"


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["ep", "dp"])
def test_muon_of_spread_parameters_is_that_of_whole_ones(sizes, tmp_path):
    run(2, tmp_path, _compare, *sizes)
