"""The router's Triton kernels against the eager twin."""

import pytest
import torch
from torch.library import opcheck

import vmoe_kernels as vk
from tests.helpers.routing import ROUTER_SIZES, check_router, router_inputs, run_router
from vmoe_kernels.common.philox import philox_normal
from vmoe_kernels.routing import triton_router
from vmoe_kernels.testing import poisoned_memory


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("size", ROUTER_SIZES)
def test_router_equals_reference(size, noise_std):
    check_router(size, torch.float32, torch.float32, noise_std, "cpu")


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", ROUTER_SIZES[1:4])
def test_router_equals_reference_in_half_precision(size, weight_dtype):
    check_router(size, torch.float16, weight_dtype, 0.5, "cpu")


def test_router_draws_the_noise_of_the_twin():
    # Zero weights leave the noise alone, and one expert of two has it as a logit difference.
    tokens, experts, seed = 300, 2, torch.tensor(-(2**50) + 9)
    out = vk.router(
        torch.ones(tokens, 3),
        torch.zeros(experts, 3),
        num_selected_experts=2,
        noise_std=1.0,
        seed=seed,
        impl="triton",
    )
    noise = philox_normal(seed, tokens, experts) / experts
    gates = torch.zeros(tokens, experts).scatter(1, out.experts.long(), out.gates)
    assert (gates - noise.softmax(-1)).abs().max() <= 4e-7


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_router_survives_nan_and_infinity(noise_std):
    size = (20, 7, 6, 5, 3)
    x, weight = router_inputs(size, torch.float32, torch.float32, "cpu")
    x[2, 1], x[9, 0], x[15, 3] = torch.nan, torch.inf, -torch.inf
    got, want = (
        run_router(lambda *a, i=impl, **k: vk.router(*a, impl=i, **k), x, weight, size, noise_std)
        for impl in ("triton", "reference")
    )
    assert torch.equal(got.pop("experts"), want.pop("experts"))
    for name, tensor in want.items():
        # Infinity times a zero weight of padding must not become NaN where the twin has infinity.
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_router_breaks_ties_to_the_lower_expert():
    x, weight = torch.randn(30, 4), torch.zeros(6, 4)
    weight[3:] = 1.0
    out = vk.router(x.abs(), weight, num_selected_experts=5, group_size=8, impl="triton")
    assert torch.equal(out.experts, torch.tensor([3, 4, 5, 0, 1], dtype=torch.int32).expand(30, 5))
    # Gates that underflow to 0 tie too, whatever their logits.
    far = vk.router(torch.ones(2, 1), torch.tensor([[-300.0], [-200.0], [0.0]]), num_selected_experts=3, impl="triton")
    assert far.experts.tolist() == [[2, 0, 1]] * 2


@pytest.mark.parametrize("size", [(21, 8, 48, 5, 2), (0, 4, 8, 4, 2)])
def test_router_writes_every_element(size):
    x, weight = router_inputs(size, torch.float32, torch.float32, "cpu")
    with poisoned_memory():
        results = run_router(lambda *a, **k: vk.router(*a, impl="triton", **k), x, weight, size, 1.0)
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name
        assert name != "experts" or tensor.numel() == 0 or int(tensor.max()) < size[3]


def test_router_sums_blocks_of_a_long_group(monkeypatch):
    # More blocks per group than a program of the second kernel reads at once.
    monkeypatch.setattr(triton_router, "_SUMS_BLOCK_B", 2)
    check_router((230, 200, 3, 4, 1), torch.float32, torch.float32, 1.0, "cpu")


def test_router_takes_strided_tensors():
    x, weight = torch.randn(6, 20).t(), torch.randn(6, 4).t()
    got, want = (
        run_router(lambda *a, i=impl, **k: vk.router(*a, impl=i, **k), x, weight, (20, 6, 6, 4, 2), 0.0)
        for impl in ("triton", "reference")
    )
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


@pytest.mark.parametrize(
    ("num_experts", "selected", "dtype", "message"),
    [
        (257, 1, torch.float32, r"num_experts must be at most 256 for the Triton router, got 257"),
        (16, 9, torch.float32, r"num_selected_experts must be at most 8 for the Triton router, got 9"),
        (4, 1, torch.float64, r"^x must be float16, bfloat16 or float32 for Triton kernels, got torch.float64"),
    ],
)
def test_router_refuses_what_its_kernels_cannot_hold(num_experts, selected, dtype, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.vmoe.router(
            torch.ones(2, 3, dtype=dtype), torch.ones(num_experts, 3, dtype=dtype), selected, 2, 0.0, None
        )


# opcheck looks at the gradient of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_router_op_passes_opcheck(noise_std):
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    opcheck(torch.ops.vmoe.router, (x, weight, 2, 4, noise_std, torch.tensor(1)))


def test_router_compiles_fullgraph():
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    seed = torch.tensor(3)

    def loss(x, weight):
        out = vk.router(x, weight, num_selected_experts=2, group_size=4, noise_std=1.0, seed=seed, impl="triton")
        return out.gates.square().sum() + out.importance.square().sum() + out.load.square().sum()

    want = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    for a, b in zip(got, want):
        assert torch.equal(a, b)
