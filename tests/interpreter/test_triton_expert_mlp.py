"""The expert MLP in Triton against its eager twin, in the interpreter."""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch.library import opcheck

from vmoe_kernels import expert_mlp, expert_mlp_reference
from vmoe_kernels.common import launch
from vmoe_kernels.common.philox import philox_keep
from vmoe_kernels.experts.activations import FORWARD
from vmoe_kernels.experts.triton_expert_mlp import expert_mlp_backward_triton, expert_mlp_triton
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS, gemm_tile, weight_operand
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.testing import (
    assert_compiles_and_exports,
    assert_matches_eager,
    make_experts,
    outputs_and_gradients,
    poisoned_memory,
)

TRITON = partial(expert_mlp, impl="triton")
GEMMS = (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS)
ODD = (3, 13, 20, 70, 33)
# float32 sums of two dozen products are a few roundings off, in eager PyTorch as here.
ULPS = 8


def _inputs(shape, dtype=torch.float32, bias=True):
    num_experts, rows, width, hidden, out = shape
    x = torch.randn(num_experts, rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"x": x, **make_experts((num_experts, width, hidden, out), dtype, bias=bias)}


@contextmanager
def _library(*gemms):
    """Runs the named GEMMs with the library's."""
    with ExitStack() as stack:
        for op in gemms:
            stack.enter_context(launch.override(op, CUBLAS))
        yield


@pytest.fixture
def philox_dropout(monkeypatch):
    """The eager twin draws the dropout masks of a CUDA device."""

    def keep(seed, stream, shape, drop):
        return philox_keep(seed + stream, shape, drop)

    monkeypatch.setattr(sys.modules["vmoe_kernels.experts.expert_mlp_op"], "dropout_keep", keep)


@pytest.mark.parametrize("activation", FORWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_expert_mlp_matches_eager(dtype, activation):
    op, reference = (partial(fn, activation=activation) for fn in (TRITON, expert_mlp_reference))
    assert_matches_eager(op, reference, _inputs(ODD, dtype), ulps=ULPS)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (5, 2, 48, 30, 48), (2, 70, 8, 65, 130), (1, 5, 768, 40, 20), (4, 0, 8, 8, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_expert_mlp_takes_any_size(dtype, shape):
    with poisoned_memory():
        assert_matches_eager(TRITON, expert_mlp_reference, _inputs(shape, dtype), ulps=ULPS)


@pytest.mark.parametrize("width", [32, 64, 96, 192])
def test_expert_mlp_keeps_parts_of_a_tile_inside_their_rows(width):
    # Tiles of 128 columns are stored in parts of 32 or 16, which divide these widths where the tile does not.
    with poisoned_memory():
        assert_matches_eager(
            TRITON, expert_mlp_reference, _inputs((2, 13, width, 160, width), torch.float16), ulps=ULPS
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_expert_mlp_needs_no_bias(dtype):
    assert_matches_eager(TRITON, expert_mlp_reference, _inputs(ODD, dtype, bias=False), ulps=ULPS)


def test_expert_mlp_without_rows_has_zero_weight_gradients():
    with poisoned_memory():
        got = outputs_and_gradients(TRITON, _inputs((4, 0, 8, 8, 8)))
    weights = [tensor for name, tensor in got.items() if name.startswith("d_fc")]
    assert len(weights) == 4
    assert all(tensor.numel() > 0 and not tensor.any() for tensor in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_expert_mlp_matches_eager_with_the_library_gemms(bias, dtype):
    tables = [f"{op}/fp32" if dtype == torch.float32 else op for op in GEMMS]
    # The second has several tiles of rows and of columns in the kernels that follow the library's.
    for shape in (ODD, (2, 40, 8, 300, 8)):
        with _library(*tables), poisoned_memory():
            assert_matches_eager(TRITON, expert_mlp_reference, _inputs(shape, dtype, bias=bias), ulps=ULPS)


@pytest.mark.parametrize("ops", [LINEAR_OPS, ("expert_d_hidden",), WEIGHT_OPS], ids=lambda ops: ops[0])
def test_expert_mlp_is_right_with_every_tile(ops):
    # More tiles than a persistent grid has programs in the interpreter, a last column tile with one full half, parts of
    # a tile past the last column that divide the width, and rows of weights that TMA takes.
    inputs = _inputs((4, 5, 16, 160, 16), torch.float16)
    tiles = [config for config in launch.candidates(ops[0]) if config != CUBLAS]
    assert len(tiles) > 1
    want = outputs_and_gradients(expert_mlp_reference, {name: value.double() for name, value in inputs.items()})
    for config in tiles:
        with ExitStack() as stack:
            for op in ops:
                stack.enter_context(launch.override(op, config))
            got = outputs_and_gradients(TRITON, inputs)
        for name, tensor in got.items():
            torch.testing.assert_close(tensor.double(), want[name], rtol=0.01, atol=0.01, msg=f"{name} with {config}")


def test_weights_are_read_by_descriptor_where_a_config_asks_and_tma_can():
    by_tma, by_pointers = gemm_tile(64, 32, 16, warps=4, stages=2, tma=True), gemm_tile(64, 32, 16, warps=4, stages=2)
    whole, odd = torch.zeros(3, 40, 24, dtype=torch.float16), torch.zeros(3, 40, 25, dtype=torch.float16)
    for transposed, block in ((False, [1, 32, 16]), (True, [1, 16, 32])):
        descriptor, launch = weight_operand(whole, by_tma, transposed)
        assert (descriptor.block_shape, launch["TMA"]) == (block, True)
        shifted = torch.zeros(whole.numel() + 4, dtype=torch.float16)[4:].view(whole.shape)
        for weight, config in ((whole, by_pointers), (odd, by_tma), (shifted, by_tma), (whole[:0], by_tma)):
            operand, launch = weight_operand(weight, config, transposed)
            assert operand is weight
            assert not launch["TMA"]


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("seed", [5, 2**40 + 5])
def test_expert_mlp_drops_as_on_cuda(philox_dropout, library, seed):
    seed = torch.tensor(seed)
    op, reference = (partial(fn, drop=0.3, seed=seed) for fn in (TRITON, expert_mlp_reference))
    with _library(*(f"{name}/fp32" for name in GEMMS if library)):
        assert_matches_eager(op, reference, _inputs(ODD), ulps=ULPS)


def test_expert_mlp_dropout_drops_the_asked_share_and_scales_the_rest():
    drop = 0.4
    eye = torch.eye(64).expand(2, 64, 64)
    first, second = (
        TRITON(torch.ones(2, 64, 64), eye, None, eye, None, activation="relu", drop=drop, seed=torch.tensor(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    dropped = first == 0
    assert abs(dropped.double().mean().item() - drop) < 0.02
    torch.testing.assert_close(first[~dropped], torch.full_like(first[~dropped], 1 / (1 - drop)))


def test_expert_mlp_backward_can_run_twice():
    inputs = {name: tensor.requires_grad_() for name, tensor in _inputs(ODD).items()}
    out = TRITON(**inputs)
    first, second = (torch.autograd.grad(out.sum(), [*inputs.values()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_expert_mlp_takes_strided_inputs():
    inputs = _inputs(ODD)
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    got, want = outputs_and_gradients(TRITON, strided), outputs_and_gradients(TRITON, inputs)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_expert_mlp_compiles_and_exports_as_one_graph():
    inputs = _inputs(ODD)
    assert_compiles_and_exports(TRITON, inputs)


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_expert_mlp_passes_opcheck():
    inputs = [tensor.requires_grad_() for tensor in _inputs((2, 3, 4, 6, 5)).values()]
    opcheck(torch.ops.vmoe.expert_mlp.default, (*inputs, "gelu", 0.0, None, True))


def test_expert_mlp_rejects_what_its_kernels_cannot_take():
    inputs = _inputs(ODD, torch.float64)
    x, *weights = inputs.values()
    with pytest.raises(ValueError, match="impl='triton' takes float16, bfloat16 and float32"):
        TRITON(**inputs)
    with pytest.raises(ValueError, match=r"x must be float16, bfloat16 or float32 .* got torch\.float64"):
        expert_mlp_triton(x, *weights, "gelu", 0.0, None, False)
    with pytest.raises(ValueError, match=r"x must be float16, bfloat16 or float32 .* got torch\.float64"):
        expert_mlp_backward_triton(x, x, x, *weights, "gelu", 0.0, None)
    huge = [torch.empty(sizes) for sizes in ((0, 2**31, 1), (0, 2, 1), (0, 2), (0, 1, 2), (0, 1))]
    with pytest.raises(
        ValueError, match=r"drop > 0 needs fewer than 2\*\*32 hidden activations .* got 2147483648 \* 2"
    ):
        expert_mlp_triton(*huge, "gelu", 0.5, torch.tensor(0), False)
