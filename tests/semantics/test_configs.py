"""Every launch config that ships or that tuning may choose, on small inputs: right, and without fault.

With `--lowered` what the compiler of a chip made of each must leave the same bits: that is where a pipeline, TMA or
tensor cores come in.
"""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

import vmoe_kernels as vk
from tests.helpers.routing import check_router, check_rows, check_slots, eager_router, make_choices
from vmoe_kernels.common import launch
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.testing import assert_matches_eager, make_experts, make_routed

BF16, FP32 = torch.bfloat16, torch.float32
GEMMS = (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS)
# (T, K, E, C): two tiles of rows an expert, the last one cut. (D, H): more steps than a pipeline is deep; rows of whole
# 16-byte units, as TMA wants them; and what all tiles divide, as V-MoE's own widths: no masks, and the wide tiles.
SHAPE, WIDTHS = (230, 2, 3, 150), ((208, 336), (256, 512))


def _configs(op: str) -> list[launch.Config]:
    return [config for config in launch.candidates(op) if config != CUBLAS]


def _rounds(*ops: str) -> list[dict[str, launch.Config]]:
    """Configs of several kernels at once, so that each of them has its turn."""
    most = max(len(_configs(op)) for op in ops)
    return [{op: _configs(op)[n % len(_configs(op))] for op in ops} for n in range(most)]


def _inputs(dtype: torch.dtype, width: int, hidden: int) -> dict:
    routed = make_routed("random", (*SHAPE, width), dtype, device="cuda")
    return {
        **{name: routed[name] for name in ("x", "slots", "gates")},
        **make_experts((SHAPE[2], width, hidden, width), dtype, device="cuda"),
    }


def _dropless(op, impl: str, x, slots, gates, *weights):
    """The same experts and gates, without capacities."""
    experts = torch.where(slots < 0, 0, slots // SHAPE[3]).to(torch.int32)
    slots, spans = vk.assign_dropless_slots(experts, num_experts=SHAPE[2], impl=impl)
    return op(x, slots, spans, gates, *weights)


def _step(kind: str, dtype: torch.dtype, widths: tuple[int, int] = WIDTHS[0], **options) -> None:
    """Forward and backward of experts against their twin."""
    inputs = _inputs(dtype, *widths)
    if kind == "dropless":
        op, twin = partial(vk.dropless_mlp, impl="triton", **options), partial(vk.dropless_mlp_reference, **options)
        ops = partial(_dropless, op, "triton"), partial(_dropless, twin, "reference")
    elif kind == "routed":
        options["rows_per_expert"] = SHAPE[3]
        ops = partial(vk.moe_mlp, impl="triton", **options), partial(vk.moe_mlp_reference, **options)
    else:
        x = torch.randn(SHAPE[2], SHAPE[3], widths[0], generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        inputs = {"x": x, **{name: value for name, value in inputs.items() if name.startswith("fc")}}
        ops = partial(vk.expert_mlp, impl="triton", **options), partial(vk.expert_mlp_reference, **options)
    assert_matches_eager(*ops, inputs, ulps=8)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kind", ["routed", "dropless", "unrouted"])
@pytest.mark.parametrize("configs", _rounds(*GEMMS), ids=range(len(_rounds(*GEMMS))))
def test_gemms(configs, kind, widths):
    with ExitStack() as stack:
        for op, config in configs.items():
            stack.enter_context(launch.override(op, config))
        _step(kind, BF16, widths)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kind", ["routed", "dropless", "unrouted"])
def test_gemms_as_the_chip_has_them(kind, widths):
    _step(kind, BF16, widths)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_gemms_with_dropout(dtype):
    _step("routed", dtype, drop=0.3, seed=torch.tensor(2**40 + 5, device="cuda"))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_epilogues_of_library_gemms(dtype):
    with ExitStack() as stack:
        for op in GEMMS:
            stack.enter_context(launch.override(f"{op}/fp32" if dtype == FP32 else op, CUBLAS))
        _step("routed", dtype)


@pytest.mark.parametrize("width", [208, 48])
@pytest.mark.parametrize("configs", _rounds("dispatch", "dispatch_backward", "combine", "combine_backward"), ids=str)
def test_rows(configs, width):
    routed = make_routed("random", (*SHAPE, width), BF16, device="cuda")
    rows = partial(vk.dispatch, num_rows=len(routed["buffer"])), partial(vk.dispatch_reference, num_rows=450)
    with ExitStack() as stack:
        for op, config in configs.items():
            stack.enter_context(launch.override(op, config))
        inputs = {name: routed[name] for name in ("x", "slots")}
        assert_matches_eager(partial(rows[0], impl="triton"), rows[1], inputs)
        inputs = {name: routed[name] for name in ("buffer", "slots", "gates")}
        assert_matches_eager(partial(vk.combine, impl="triton"), vk.combine_reference, inputs)


@pytest.mark.parametrize("num_experts", [8, 40, 100, 200])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32)], ids=str)
def test_router(dtypes, num_experts):
    size = (150, 70, 100, num_experts, 2)
    options = {} if dtypes == (FP32, FP32) else {"eager": eager_router}
    check_router(size, *dtypes, 1.0, "cuda", **options)


@pytest.mark.parametrize("batch_priority", [True, False])
@pytest.mark.parametrize("design", ["sort", "select"])
def test_slots(design, batch_priority):
    experts, gates = make_choices("random", 300, 8, 2, "cuda")
    sizes = {"num_experts": 8, "group_size": 130, "capacity": 20, "last_capacity": 9}
    options = {**sizes, "batch_priority": batch_priority, "priority": "max"}
    with launch.override("slots", launch.Config({"DESIGN": design}, num_warps=4)):
        check_slots(experts, gates, partial(vk.assign_slots, impl="triton"), **options)
        check_rows(experts, gates, **options)
