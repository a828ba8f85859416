"""The whole MoE layer against the original: output, loss and every gradient by name."""

import pytest
import torch

from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.layers import MoeMlp

PARAMETERS = {
    "router.weight": "Router/dense/kernel",
    "fc1.weight": "Mlp/Dense_0/kernel",
    "fc1.bias": "Mlp/Dense_0/bias",
    "fc2.weight": "Mlp/Dense_1/kernel",
    "fc2.bias": "Mlp/Dense_1/bias",
}


def _ours(array, name):
    tensor = torch.from_numpy(array)
    return tensor.transpose(-1, -2) if name.endswith("weight") else tensor


def _layer(case, impl, auxiliary_mode):
    config = manifest("moe_layer")[case]["config"]
    want = golden_arrays("moe_layer", case)
    images = config["group_size"] // config["seq_len"]
    layer = MoeMlp(
        config["hidden"],
        config["mlp_dim"],
        act_layer="gelu_tanh",
        num_experts=config["num_experts"],
        num_selected_experts=config["num_selected_experts"],
        capacity_factor=config["capacity_factor"],
        capacity_multiple_of=config["capacity_multiple_of"],
        batch_priority=config["batch_priority"],
        group_size=images,
        noise_std=0.0 if config["deterministic"] else config["noise_std"],
        importance_loss_weight=config["importance_loss_weight"],
        load_loss_weight=config["load_loss_weight"],
        gshard_loss_weight=config["gshard_loss_weight"],
        dispatch_dtype="bfloat16" if config["bfloat16"] else None,
        auxiliary_mode=auxiliary_mode,
        impl=impl,
    )
    layer.load_state_dict({name: _ours(want[f"params/{path}"], name) for name, path in PARAMETERS.items()})
    return config, want, layer


@pytest.mark.parametrize("auxiliary_mode", ["injected", "manual"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", golden_cases("moe_layer"))
def test_layer_equals_original(case, impl, auxiliary_mode, golden_noise):
    config, want, layer = _layer(case, impl, auxiliary_mode)
    if "noise" in want:
        golden_noise(want["noise"])
    x = torch.from_numpy(want["inputs"]).requires_grad_()
    y = layer(x)
    loss = (y * torch.from_numpy(want["cotangent"])).sum()
    total = loss + layer.record.loss
    (total if auxiliary_mode == "manual" else loss).backward()
    # The original rounds the gradients at the experts' borders to bfloat16 as well, in another order of operations.
    budget = 2e-2 if config["bfloat16"] else 1e-5
    forward_budget = 5e-3 if config["bfloat16"] else 1e-5
    assert relative_error(layer.record.gates.sort(1).values, _chosen(want, config)) <= 1e-6
    assert relative_error(y, want["outputs"]) <= forward_budget
    # Terms of both signs cancel in the sum, so its error is measured against their absolute sum.
    terms = (y * torch.from_numpy(want["cotangent"])).abs().sum().item()
    assert abs(total.item() - want["loss"].item()) <= forward_budget * terms
    assert relative_error(x.grad, want["grad_inputs"]) <= budget
    for name, path in PARAMETERS.items():
        gradient = layer.get_parameter(name).grad
        assert relative_error(gradient, _ours(want[f"grads/{path}"], name)) <= budget, name


def _chosen(want, config):
    gates = torch.from_numpy(want["router_gates"])
    return gates.flatten(0, 1).topk(config["num_selected_experts"]).values.sort(1).values


@pytest.mark.parametrize("case", ["case_06", "case_16"])
def test_float64_equals_reference(case):
    results = []
    for impl in ("auto", "reference"):
        _, want, layer = _layer(case, impl, "injected")
        layer.double()
        x = torch.from_numpy(want["inputs"]).double().requires_grad_()
        y = layer(x)
        (y * torch.from_numpy(want["cotangent"]).double()).sum().backward()
        results.append({"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()})
    for name, got in results[0].items():
        assert got.dtype == torch.float64
        assert relative_error(got, results[1][name].detach()) <= 1e-12, name
