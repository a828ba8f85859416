"""Auxiliary losses and their gradients against the original."""

import pytest
import torch

import vmoe_kernels as vk
from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.layers import MoeMlp, cv_squared, gshard_loss, importance_loss, load_loss

LOSSES = golden_cases("aux_losses", lambda config: "weights" in config)
ROUTERS = golden_cases("aux_losses", lambda config: "num_selected_experts" in config)


def test_golden_folder_has_both_kinds_of_cases():
    assert LOSSES
    assert ROUTERS
    assert len(LOSSES) + len(ROUTERS) + 1 == len(manifest("aux_losses"))


@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_original(case):
    config = manifest("aux_losses")[case]["config"]
    want = golden_arrays("aux_losses", case)
    logits = torch.from_numpy(want["logits"]).requires_grad_()
    noise = torch.from_numpy(want["logits_noisy"] - want["logits"])
    noisy = logits + noise
    losses = {
        "importance": importance_loss(logits),
        "gshard_deterministic": gshard_loss(logits.softmax(-1)),
        "gshard_noisy": gshard_loss(noisy.softmax(-1)),
        "load": load_loss(logits, noisy, config["noise_std"], config["k"]),
    }
    keys = {
        "importance": ("importance_loss", "importance_grad"),
        "gshard_deterministic": ("gshard_loss_deterministic", "gshard_grad_deterministic"),
        "gshard_noisy": ("gshard_loss_noisy", "gshard_grad_noisy"),
        "load": ("load_loss", "load_grad_total"),
    }
    for name, loss in losses.items():
        value, gradient = keys[name]
        assert relative_error(loss, want[value]) <= 1e-5, name
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert relative_error(grad, want[gradient]) <= 1e-5, name


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", ROUTERS)
def test_router_metrics_equal_original(case, impl, golden_noise):
    config = manifest("aux_losses")[case]["config"]
    want = golden_arrays("aux_losses", case)
    _, tokens, width = want["inputs"].shape
    if "noise" in want:
        golden_noise(want["noise"])
    noise_std = 0.0 if config["deterministic"] else config["noise_std"]
    layer = MoeMlp(
        width,
        8,
        num_experts=config["E"],
        num_selected_experts=config["num_selected_experts"],
        noise_std=noise_std,
        importance_loss_weight=config["importance_loss_weight"],
        load_loss_weight=config["load_loss_weight"],
        gshard_loss_weight=config["gshard_loss_weight"],
    )
    out = vk.route(
        torch.from_numpy(want["inputs"]).view(-1, width),
        torch.from_numpy(want["kernel"]).t(),
        num_selected_experts=config["num_selected_experts"],
        capacity=config["capacity"],
        group_size=tokens,
        noise_std=noise_std,
        seed=torch.tensor(0),
        impl=impl,
    )
    assert relative_error(cv_squared(out.importance), want["metrics/importance_loss"]) <= 1e-5
    loss = layer.router.auxiliary_loss(out.importance, out.load, out.mean_gates, out.top1_share)
    assert relative_error(loss, want["metrics/auxiliary_loss"].mean()) <= 1e-5
    if not config["deterministic"]:
        assert relative_error(cv_squared(out.load), want["metrics/load_loss"]) <= 1e-5
    weights = want["combine_weights"].reshape(out.gates.shape)
    assert relative_error(out.gates, weights) <= 1e-6


def test_balanced_gates_have_zero_gradient():
    # The original has a square root at 0 here, and NaN gradients.
    want = golden_arrays("aux_losses", "degenerate_uniform")
    logits = torch.from_numpy(want["logits"]).requires_grad_()
    loss = importance_loss(logits)
    loss.backward()
    assert loss == want["importance_loss"] == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_cv_squared_is_exact_near_balance():
    shares = 1.0 + 1e-4 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert relative_error(cv_squared(shares), cv_squared(shares.double()).float()) <= 1e-5
    balanced = torch.full((2, 8), 0.125, requires_grad=True)
    cv_squared(balanced).sum().backward()
    assert cv_squared(balanced).tolist() == balanced.grad.sum(1).tolist() == [0.0, 0.0]
    nothing = torch.zeros(2, 8, requires_grad=True)
    cv_squared(nothing).sum().backward()
    assert cv_squared(nothing).tolist() == nothing.grad.sum(1).tolist() == [0.0, 0.0]
