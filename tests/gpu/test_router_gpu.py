"""The router's Triton kernels on a GPU, against float64 and eager PyTorch."""

import pytest
import torch

import vmoe_kernels as vk
from tests.helpers.routing import ROUTER_SIZES, check_router, eager_router, router_inputs, run_router
from vmoe_kernels.testing import forbidden_synchronisation

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


@pytest.mark.parametrize("size", SIZES[2:6])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str
)
def test_router_takes_each_16_bit_dtype_beside_the_other(dtype, weight_dtype, size):
    check_router(size, dtype, weight_dtype, 1.0, "cuda", eager=eager_router)


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
    with forbidden_synchronisation():
        step()


def test_router_takes_more_than_2_to_the_31_elements(needs_free_memory):
    needs_free_memory(16)
    tokens = 2**31 // 768 + 10
    x = torch.zeros(tokens, 768, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1] = torch.randn(768, device="cuda")
    weight = torch.randn(8, 768, device="cuda")
    x.requires_grad_()
    logits = vk.router(x, weight, num_selected_experts=2, group_size=1568, impl="triton").logits
    torch.testing.assert_close(logits[-1], weight @ x[-1].detach().float(), rtol=1e-4, atol=1e-4)
    assert not logits[:-1].any()
    d_logits = torch.zeros_like(logits)
    d_logits[-1, 3] = 1.0
    (d_x,) = torch.autograd.grad(logits, x, d_logits)
    torch.testing.assert_close(d_x[-1].float(), weight[3], rtol=1e-2, atol=1e-2)
    assert not d_x[:-1].any()
