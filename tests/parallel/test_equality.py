"""Expert parallelism computes what one process computes: logits, gradients, clipped norm, ten optimiser steps."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vmoe_torch
from tests.parallel.processes import run
from vmoe_torch.parallel import build_mesh, clip_grad_norm, parallelize, parameter_groups

IMAGES = 8  # of all ranks together
STEPS = 10
# Weights of the router that the others have not; the capacity is theirs.
SOFT = {"router": "soft", "slots_per_expert": 3, "capacity_factor": 1.05}


def _model(dtype, **kwargs):
    torch.manual_seed(0)
    model = vmoe_torch.VMoE(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        num_classes=5,
        num_experts=4,
        group_size=1,
        noise_std=0.0,
        **{"capacity_factor": 0.7, **kwargs},
    ).to(dtype)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    # Experts start alike and routers weak: spread them, so that a wrong expert or a wrong drop shows.
    for layer in vmoe_torch.moe_layers(model).values():
        for router in (p for p in layer.router.parameters() if p.ndim > 1):
            torch.nn.init.normal_(router, std=0.5)
        for fc in (*layer.fc1.linears(), *layer.fc2.linears()):
            torch.nn.init.normal_(fc.weight, std=0.1)
    return model


def _data(dtype, all_dropped):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=dtype)
    if all_dropped:
        # The first images are all zero: their tokens differ by position only, and nearly all want one expert.
        x[: IMAGES // 4] = 0.0
    return x, torch.randint(5, (IMAGES,), generator=generator)


def _train(model, x, y, optimizer, max_norm):
    """Ten steps; the first one's logits, gradients and norm are returned."""
    first = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, y).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = first or {
            name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in gradients.items()
        }
        norm = clip_grad_norm(model.parameters(), max_norm)
        if first is None:
            first, start = gradients, (logits.detach().clone(), norm.clone())
        optimizer.step()
    return (*start, first)


def _adamw(model, split):
    groups = [{"params": list(model.parameters())}]
    return torch.optim.AdamW(split(groups), lr=1e-3, weight_decay=0.05)


def _compare(dp, ep, dtype, budget, kwargs, model_kwargs, all_dropped):
    mesh = build_mesh(dp, ep, "cpu")
    rank, world = dist.get_rank(), dist.get_world_size()
    single = _model(dtype, **model_kwargs)
    spread = parallelize(copy.deepcopy(single), mesh, **kwargs)
    # Process groups are few: the layers share theirs.
    assert len({id(layer.exchange) for layer in vmoe_torch.moe_layers(spread).values()}) == 1
    x, y = _data(dtype, all_dropped)
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    max_norm = 0.5
    want = _train(single, x, y, _adamw(single, list), max_norm)
    got = _train(spread, x[mine], y[mine], _adamw(spread, parameter_groups), max_norm)

    def close(name, got, want):
        error = (got - want).abs().max() / want.abs().max()
        assert error <= budget, f"{name}: {error:.2e}"

    close("logits", got[0], want[0][mine])
    close("norm", got[1], want[1])
    assert want[1] > max_norm, "clipping must be at work"
    for name, gradient in want[2].items():
        if not name.endswith("attn.qkv.bias"):
            close(name, got[2][name], gradient)
    state = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in spread.named_parameters()}
    for name, parameter in single.named_parameters():
        # Adam blows the rounding of the key bias, which has no gradient, up to full steps.
        if not name.endswith("attn.qkv.bias"):
            close(f"{name} after {STEPS} steps", state[name], parameter)
    with torch.no_grad():
        close("logits at the end", spread.eval()(x[mine]), single.eval()(x)[mine])


# dp, ep, dtype, budget, arguments of parallelize, arguments of the model, whether the first images nearly all drop
TWO_RANKS = [
    (1, 2, torch.float64, 1e-9, {}, {}, True),
    (1, 2, torch.float32, 1e-5, {}, {}, False),
    (2, 1, torch.float64, 1e-9, {}, {}, False),
    (1, 2, torch.float64, 1e-9, {"chunks": 2}, {"expert_hidden": [0.5, 1.0, 0.5, 1.0], "size_loss_weight": 0.1}, True),
    (1, 2, torch.float64, 1e-9, {"chunks": 3, "recompute": True}, {"num_selected_experts": 1}, True),
    (1, 2, torch.float64, 1e-9, {"chunks": 2, "recompute": True}, SOFT, False),
    (1, 2, torch.float64, 1e-9, {}, {"shared_expert_hidden": 0.5, "router_z_loss_weight": 0.1}, False),
]
FOUR_RANKS = [
    (2, 2, torch.float64, 1e-9, {"reshard_after_forward": False}, {}, True),
    (1, 4, torch.float64, 1e-9, {"ranks_per_node": 2}, {"batch_priority": False}, False),
]


def _compare_all(cases):
    for case in cases:
        _compare(*case)


@pytest.mark.parametrize("cases", [TWO_RANKS, FOUR_RANKS], ids=["2 ranks", "4 ranks"])
def test_parallel_equals_single(cases, tmp_path):
    # One set of processes for all cases of a size: starting them takes longer than the cases.
    run(cases[0][0] * cases[0][1], tmp_path, _compare_all, cases)
