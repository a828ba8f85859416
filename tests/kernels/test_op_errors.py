"""Bad input: an error that names the thing, the rule and what was got."""

import pytest
import torch

import vmoe_kernels as vk

X = torch.randn(6, 4)
WEIGHT = torch.randn(3, 4)
SLOTS = torch.tensor([[0], [1], [2], [3], [-1], [4]], dtype=torch.int32)
EXPERTS = torch.zeros(6, 1, dtype=torch.int32)
GATES = torch.rand(6, 1)
FC1, B1, FC2, B2 = torch.randn(3, 5, 4), torch.randn(3, 5), torch.randn(3, 4, 5), torch.randn(3, 4)


def _route(**changes):
    return vk.route(**{"x": X, "weight": WEIGHT, "num_selected_experts": 1, "capacity": 2} | changes)


def _moe(**changes):
    arguments = {"x": X, "slots": SLOTS, "gates": GATES, "fc1_weight": FC1, "fc1_bias": B1, "fc2_weight": FC2}
    return vk.moe_mlp(**arguments | {"fc2_bias": B2, "rows_per_expert": 2} | changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _route(num_selected_experts=4), r"num_selected_experts must be in 1\.\.num_experts=3, got 4"),
        (lambda: _route(num_selected_experts=0), r"num_selected_experts must be in 1\.\.num_experts=3, got 0"),
        (lambda: _route(capacity=0), r"capacity must be at least 1 slot, got 0"),
        (lambda: _route(group_size=0), r"group_size must be at least 1 token, got 0"),
        (lambda: _route(noise_std=-1.0), r"noise_std must be at least 0, got -1\.0"),
        (lambda: _route(noise_std=1.0), r"seed must be a 0-dim int64 tensor when noise_std > 0, got None"),
        (lambda: _route(x=X.long()), r"x must be floating point, got torch\.int64"),
        (lambda: _route(weight=WEIGHT.to("meta")), r"weight must be on cpu like x, got meta"),
        (lambda: _route(weight=torch.randn(3, 5)), r"x \(T, D\) and weight \(E, D\) must agree, got \(6, 4\) and"),
        (lambda: _route(priority="mean", batch_priority=True), r"priority must be one of \('max', 'sum'\), got 'mean'"),
        (lambda: _route(impl="cuda"), r"impl must be one of .*, got 'cuda'"),
        (lambda: _route(impl="triton"), r"impl='triton' needs Triton and a CUDA tensor, got a tensor on cpu"),
        (lambda: vk.compute_capacity(8, 4, 1.0, rounding="floor"), r"rounding must be 'ceil' or 'round', got floor"),
        (lambda: vk.dispatch(X, SLOTS.long(), 6), r"slots must be int32, got torch\.int64"),
        (lambda: vk.dispatch(X, SLOTS[:4], 6), r"slots must be \(T, K\) with T=6, got \(4, 1\)"),
        (lambda: vk.dispatch(X, SLOTS, -1), r"num_rows must be at least 0, got -1"),
        (lambda: vk.dispatch(X[0], SLOTS, 6), r"x must be \(T, D\), got \(4,\)"),
        (lambda: vk.combine(X, SLOTS, GATES[:2]), r"gates must have the shape of slots \(6, 1\), got \(2, 1\)"),
        (lambda: _moe(fc1_weight=FC1[:, :, :3]), r"fc1_weight must be \(E, H, D\) with D=4, got \(3, 5, 3\)"),
        (lambda: _moe(fc2_weight=FC2[:2]), r"fc2_weight must be \(E, O, H\) with E=3 and H=5, got \(2, 4, 5\)"),
        (lambda: _moe(fc1_bias=B2), r"fc1_bias must be \(3, 5\), got \(3, 4\)"),
        (lambda: _moe(fc1_weight=FC1.double()), r"fc1_weight must be torch\.float32 like x, got torch\.float64"),
        (lambda: _moe(activation="mish"), r"activation must be one of .*, got 'mish'"),
        (lambda: _moe(drop=1.0), r"drop must be in \[0, 1\), got 1\.0"),
        (lambda: _moe(drop=0.5), r"seed must be a 0-dim int64 tensor when drop > 0, got None"),
        (lambda: _moe(rows_per_expert=-1), r"rows_per_expert must be at least 0, got -1"),
        (lambda: vk.expert_mlp(X, FC1, B1, FC2, B2), r"x must be \(E, R, D\) with E=3, got \(6, 4\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
