"""torch.vmap over the ops: the samples' own results and gradients, in one call each."""

import pytest
import torch

import vmoe_kernels as vk
from tests.conftest import relative_error

B, T, K, E, R, D, H = 3, 12, 2, 4, 5, 6, 7
GROUPS = {"num_experts": E, "capacity": 2, "batch_priority": True}


@pytest.fixture
def data():
    """Samples of everything a layer takes, the batch in front."""
    make = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    rows = torch.stack([torch.randperm(E * R, generator=make) for _ in range(B)])[:, : T * K]
    slots = torch.full((B, T * K), -1)
    slots[:, : E * R] = rows
    shuffled = slots[:, torch.randperm(T * K, generator=make)].view(B, T, K)
    return {
        "x": randn(B, T, D),
        "rows": randn(B, E, R, D),
        "slots": shuffled.to(torch.int32),
        "gates": randn(B, T, K).sigmoid(),
        "weights": [randn(B, E, H, D), randn(B, E, H), randn(B, E, D, H), randn(B, E, D)],
        "router": randn(E, D),
    }


def check(op, in_dims, *inputs):
    """vmap's outputs and gradients against a loop over the samples."""
    results = []
    for run in ("vmap", "loop"):
        leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
        if run == "vmap":
            out = torch.vmap(op, in_dims)(*leaves)
        else:
            samples = [
                op(*(each if dim is None else each.select(dim, b) for each, dim in zip(leaves, in_dims)))
                for b in range(B)
            ]
            out = tuple(map(torch.stack, zip(*samples))) if isinstance(samples[0], tuple) else torch.stack(samples)
        outputs = list(out) if isinstance(out, tuple) else [out]
        losses = [each.square().sum() for each in outputs if each.requires_grad]
        if losses:
            sum(losses).backward()
        results.append(outputs + [each.grad for each in leaves if each.grad is not None])
    assert len(results[0]) == len(results[1])
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert relative_error(got.detach(), want.detach()) <= 1e-12


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_vmap_dispatch(data, in_dims):
    x, slots = data["x"], data["slots"]
    x = x[0] if in_dims[0] is None else x.movedim(0, in_dims[0])
    check(lambda x, slots: vk.dispatch(x, slots, E * R), in_dims, x, slots[0] if in_dims[1] is None else slots)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, None, 0), (0, 0, None)])
def test_vmap_combine(data, in_dims):
    inputs = (data["rows"].flatten(1, 2), data["slots"], data["gates"])
    inputs = [each[0] if dim is None else each for each, dim in zip(inputs, in_dims)]
    check(vk.combine, in_dims, *inputs)


@pytest.mark.parametrize("weight_dims", [(None,) * 4, (0,) * 4, (0, None, None, 0)])
@pytest.mark.parametrize("x_dim", [0, None])
def test_vmap_expert_mlp(data, x_dim, weight_dims):
    if x_dim is None and weight_dims == (None,) * 4:
        x_dim = 2  # vmap needs something to map over
    x = data["rows"][0] if x_dim is None else data["rows"].movedim(0, x_dim)
    weights = [each[0] if dim is None else each for each, dim in zip(data["weights"], weight_dims)]
    check(vk.expert_mlp, (x_dim, *weight_dims), x, *weights)


@pytest.mark.parametrize("weight_dims", [(None,) * 4, (0,) * 4, (1, None, None, 0)])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, 0)])
def test_vmap_moe_mlp(data, in_dims, weight_dims):
    inputs = [
        each[0] if dim is None else each for each, dim in zip((data[n] for n in ("x", "slots", "gates")), in_dims)
    ]
    weights = [each[0] if dim is None else each.movedim(0, dim) for each, dim in zip(data["weights"], weight_dims)]
    check(
        lambda *each: vk.moe_mlp(*each, rows_per_expert=R, activation="silu"),
        (*in_dims, *weight_dims), *inputs, *weights,
    )  # fmt: skip


@pytest.mark.parametrize("group_size", [4, T, 50])
def test_vmap_router_and_slots(data, group_size):
    def router(x, weight):
        return tuple(vk.router(x, weight, num_selected_experts=K, group_size=group_size))

    check(router, (0, None), data["x"], data["router"])
    experts = router(data["x"].flatten(0, 1), data["router"])[1].view(B, T, K)
    last = 1 if group_size > T else 2

    def slots(experts, gates):
        return vk.assign_slots(experts, gates, **GROUPS, group_size=group_size, last_capacity=last)

    def rows(experts, gates):
        return tuple(vk.assign_rows(experts, gates, **GROUPS, group_size=group_size, last_capacity=last))

    check(slots, (0, 0), experts, data["gates"])
    check(rows, (0, 0), experts, data["gates"])
    check(slots, (0, None), experts, data["gates"][0])


def test_vmap_survives_nothing_kept(data):
    slots = torch.full((B, T, K), -1, dtype=torch.int32)
    weights = [each[0] for each in data["weights"]]
    check(
        lambda x, slots, gates: vk.moe_mlp(x, slots, gates, *weights, rows_per_expert=0),
        (0, 0, 0),
        data["x"],
        slots,
        data["gates"],
    )
    check(lambda x, slots: vk.dispatch(x, slots, 0), (0, 0), data["x"], slots)


def test_vmap_refuses_what_one_call_cannot_do(data):
    x, router, weights = data["x"], data["router"], [each[0] for each in data["weights"]]
    seed = torch.tensor(3)

    def scored(x, weight, **settings):
        return tuple(vk.router(x, weight, num_selected_experts=K, **settings))

    with pytest.raises(ValueError, match=r"over router needs groups that divide .* got 12 tokens in groups of 5"):
        torch.vmap(lambda x: scored(x, router, group_size=5))(x)
    with pytest.raises(ValueError, match=r"over router needs noise_std=0, got 1.0"):
        torch.vmap(lambda x: scored(x, router, noise_std=1.0, seed=seed))(x)
    with pytest.raises(ValueError, match=r"needs one weight for all samples, got a batched weight"):
        torch.vmap(scored)(x, router.expand(B, E, D))
    with pytest.raises(ValueError, match=r"over assign_slots needs groups that divide"):
        torch.vmap(lambda e, g: vk.assign_slots(e, g, **GROUPS, group_size=5))(data["slots"].clamp(0, 3), data["gates"])
    with pytest.raises(ValueError, match=r"over expert_mlp needs drop=0, got 0.5"):
        torch.vmap(lambda x: vk.expert_mlp(x, *weights, drop=0.5, seed=seed))(data["rows"])
    with pytest.raises(ValueError, match=r"over moe_mlp needs drop=0, got 0.5"):
        torch.vmap(
            lambda x, slots, gates: vk.moe_mlp(x, slots, gates, *weights, rows_per_expert=R, drop=0.5, seed=seed)
        )(x, data["slots"], data["gates"])
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 rows in all, got 3 samples of 1000000000"):
        torch.vmap(lambda x, slots: vk.dispatch(x, slots, 10**9))(x, data["slots"])
