"""The router's Triton kernels on a GPU, against float64 and eager PyTorch."""

import pytest
import torch

import vmoe_kernels as vk
from tests.routing_checks import ROUTER_SIZES, check_router, eager_router, router_inputs, run_router

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Few enough tokens that no float32 rounding swaps two experts whose logits nearly tie.
SIZES = [*ROUTER_SIZES, (600, 350, 768, 32, 2), (300, 300, 1280, 64, 2), (300, 197, 768, 128, 2)]


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_router_equals_reference(size, noise_std):
    check_router(size, torch.float32, torch.float32, noise_std, "cuda")


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("narrow_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_router_equals_reference_in_16_bits(size, dtype, narrow_weight, noise_std):
    weight_dtype = dtype if narrow_weight else torch.float32
    check_router(size, dtype, weight_dtype, noise_std, "cuda", eager=eager_router)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_is_bitwise_equal_in_two_runs(dtype):
    size = (25_088, 1568, 768, 32, 2)
    x, weight = router_inputs(size, dtype, torch.float32, "cuda")
    first, second = (
        run_router(lambda *a, **k: vk.router(*a, impl="triton", **k), x, weight, size, 1.0) for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_router_never_synchronises():
    size = (2000, 700, 768, 32, 2)
    x, weight = router_inputs(size, torch.bfloat16, torch.float32, "cuda")
    x, weight = x.requires_grad_(), weight.requires_grad_()
    seed = torch.tensor(7, device="cuda")

    def step():
        out = vk.router(x, weight, num_selected_experts=2, group_size=700, noise_std=1.0, seed=seed, impl="triton")
        (out.gates.sum() + out.importance.square().sum() + out.load.square().sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
