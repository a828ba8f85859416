"""Dropless slots and experts in Triton against their eager twins, in the interpreter."""

import sys
from functools import partial

import pytest
import torch
from torch.library import opcheck

from tests.kernels.test_dropless import make_choices, make_inputs
from vmoe_kernels import assign_dropless_slots, dropless_mlp, dropless_mlp_reference
from vmoe_kernels.common import launch
from vmoe_kernels.common.groups import dropless_rows
from vmoe_kernels.common.impl import ROW_TILE
from vmoe_kernels.common.philox import philox_keep
from vmoe_kernels.experts.triton_buffer import Buffer
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS, gemm_config, gemm_tile
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.testing import (
    assert_compiles_and_exports,
    assert_matches_eager,
    outputs_and_gradients,
    poisoned_memory,
)

OPS = partial(dropless_mlp, impl="triton"), dropless_mlp_reference
# float32 sums of two dozen products are a few roundings off, in eager PyTorch as here.
ULPS = 8


@pytest.mark.parametrize("kind", ["random", "one_expert", "some", "none"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 1), (1, 1, 1, 1), (13, 3, 5, 4), (300, 2, 40, 300)], ids=str)
def test_slots_equal_eager(shape, kind):
    num_tokens, num_choices, num_experts, group = shape
    experts = make_choices(num_tokens, num_choices, num_experts, kind=kind)
    for tile in (128, 256):
        settings = {"num_experts": num_experts, "group_size": group, "tile": tile}
        got = assign_dropless_slots(experts, **settings, impl="triton")
        want = assign_dropless_slots(experts, **settings, impl="reference")
        assert all(torch.equal(*pair) for pair in zip(got, want))


def _inputs(num_tokens, num_choices, num_experts, kind, dtype=torch.float32, **options):
    return make_inputs(make_choices(num_tokens, num_choices, num_experts, kind=kind), num_experts, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "one_expert", "some", "none"])
def test_mlp_matches_eager(kind, dtype):
    """Of 130 rows an expert has two tiles; the last tile of the buffer belongs to nobody."""
    with poisoned_memory():
        assert_matches_eager(*OPS, _inputs(130, 2, 4, kind, dtype), ulps=ULPS)


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 1, 1), (5, 3, 3)], ids=str)
def test_mlp_takes_few_tokens(shape):
    with poisoned_memory():
        assert_matches_eager(*OPS, _inputs(*shape, "random"), ulps=ULPS)


def test_mlp_needs_no_bias():
    assert_matches_eager(*OPS, _inputs(13, 2, 4, "random", bias=False), ulps=ULPS)


def test_mlp_keeps_an_idle_expert_out_of_everything():
    inputs = _inputs(9, 2, 6, "one_expert")
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        inputs[name][:4] = torch.nan
    with poisoned_memory():
        got = outputs_and_gradients(OPS[0], inputs)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert not any(got[f"d_{name}"][:4].any() for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))


def test_mlp_drops_as_on_cuda(monkeypatch):
    def keep(seed, stream, shape, drop):
        return philox_keep(seed + stream, shape, drop)

    monkeypatch.setattr(sys.modules["vmoe_kernels.experts.dropless_mlp_op"], "dropout_keep", keep)
    ops = (partial(op, drop=0.3, seed=torch.tensor(11)) for op in OPS)
    assert_matches_eager(*ops, _inputs(13, 2, 4, "random"), ulps=ULPS)


def test_no_tile_holds_rows_of_two_experts():
    """The library and tiles of other heights are passed over for one that keeps experts apart."""
    buffer = Buffer(4, 512, torch.zeros(128, 2, dtype=torch.int32), spans=torch.zeros(2, 4, dtype=torch.int32))
    tall, cpu = gemm_tile(256, 128, 64, warps=8, stages=3), torch.device("cpu")
    for op in (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS):
        for dtype in (torch.float16, torch.float32):
            name = f"{op}/fp32" if dtype == torch.float32 else op
            for other in (CUBLAS, tall):
                with launch.override(name, other):
                    config = gemm_config(op, dtype, buffer, cpu)
                assert config not in (CUBLAS, tall)
                assert op in WEIGHT_OPS or ROW_TILE % config.constexprs["BLOCK_ROWS"] == 0


@pytest.mark.parametrize("persistent", [False, True])
def test_mlp_takes_every_kind_of_tile(persistent):
    inputs = _inputs(130, 2, 4, "some", torch.float16)
    tile = gemm_tile(64, 64, 32, warps=4, stages=2, parts=2, persistent=persistent, tma=persistent)
    with launch.override("expert_up", tile), launch.override("expert_d_hidden", tile), poisoned_memory():
        assert_matches_eager(*OPS, inputs, ulps=ULPS)


def test_tiles_have_the_owners_of_their_rows():
    experts = make_choices(300, 2, 5, kind="some")
    experts[experts == 2] = -1
    slots, spans = assign_dropless_slots(experts, num_experts=5)
    rows = dropless_rows(experts.numel(), 5, ROW_TILE)
    owners = Buffer(5, rows, slots, spans=spans).owners
    assert owners.shape == (rows // ROW_TILE,)
    kept = slots >= 0
    assert torch.equal(owners[slots[kept] // ROW_TILE], experts[kept])
    assert 0 <= owners.min() <= owners.max() < 5


def test_ops_compile_and_export_as_one_graph():
    inputs = _inputs(13, 2, 4, "random")
    experts = make_choices(13, 2, 4)

    def op(x, gates, *weights):
        return OPS[0](x, *assign_dropless_slots(experts, num_experts=4, group_size=5), gates, *weights)

    assert_compiles_and_exports(op, {name: each for name, each in inputs.items() if each.is_floating_point()})


# opcheck itself reads .grad of tensors that are no leaves, and compares the saved pre-activation of rows that hold
# nothing, so there is none of these: one expert with a whole tile.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_ops_pass_opcheck():
    opcheck(torch.ops.vmoe.assign_dropless_slots, (make_choices(13, 2, 4), 4, 5, 128))
    inputs = _inputs(128, 1, 1, "random")
    values = [each.requires_grad_() if each.is_floating_point() else each for each in inputs.values()]
    assert dropless_rows(128, 1, ROW_TILE) == 128
    opcheck(torch.ops.vmoe.dropless_mlp.default, (*values, "silu", 0.0, None, True))
