"""Launches recorded from real calls: what Triton makes of their arguments, and nothing that ships left out."""

import inspect
import pkgutil
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.jit import JITFunction

import vmoe_kernels
from benchmarks.compile.launches import CALLS, CAPABILITIES, capture, record
from tests.benchmarks.compile.example_kernels import product_case, sums_case
from vmoe_kernels.common import launch
from vmoe_torch.layers import MoeMlp, steps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captured():
    return {chip: capture(chip) for chip in CAPABILITIES}


def test_record_keeps_types_constants_options_and_grid():
    case = product_case("product", torch.bfloat16, inner=32)
    assert case.signature == {"a": "*bf16", "b": "*bf16", "c": "*bf16", "K": "i32"}
    assert case.constexprs == {"BLOCK": 64, "PRECISION": "tf32"}
    assert case.divisible == ("a", "b", "c", "K")
    assert (case.num_warps, case.num_stages, case.max_registers, case.grid) == (4, 2, None, (1, 2))
    assert case.has_dot
    assert not sums_case("sums", 64, 1).has_dot
    odd = product_case("product", torch.float32, inner=33)
    assert odd.divisible == ("a", "b", "c")
    assert odd.content != case.content == product_case("other", torch.bfloat16, inner=32).content
    # Triton makes a constant of a 1, and a pointer that is not there.
    assert product_case("product", torch.float32, inner=1).constexprs["K"] == 1


def test_record_leaves_triton_and_the_tables_as_they_were():
    run, kind = JITFunction.run, launch.device_kind(CPU)
    with record(90) as launches:
        assert launch.device_kind(CPU) == "sm90"
    assert launches == []
    assert JITFunction.run is run
    assert launch.device_kind(CPU) == kind


def test_a_layer_launches_eight_kernels_forward_and_backward_with_those_of_the_chip():
    run = CALLS["routed/bf16/gelu_tanh/768x3072"]
    launches = {}
    for chip in (80, 90):
        with record(chip) as launches[chip]:
            run()
    assert [each.name for each in launches[80]] == [each.name for each in launches[90]]
    assert [each.name for each in launches[90]] == [
        *("choice_of_row", "expert_up", "expert_down", "combine"),
        *("choice_of_row", "expert_d_hidden", "output_bias", "sum_parts"),
        *("expert_d_fc2", "expert_d_fc1", "expert_d_rows", "dispatch_backward"),
    ]
    up = {chip: next(each for each in found if each.name == "expert_up") for chip, found in launches.items()}
    assert (up[80].constexprs["BLOCK_COLS"], up[90].constexprs["BLOCK_COLS"]) == (128, 256)


class _Library(TorchDispatchMode):
    """Names of PyTorch's own operators that launch something: results that are neither views nor memory alone."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if operator.namespace == "aten" and "empty" not in name:
            given = {each.data_ptr() for each in args if isinstance(each, torch.Tensor)}
            if name.endswith("_") or out.data_ptr() not in given:
                self.launches.append(name)
        return out


@pytest.mark.parametrize("batch_priority", [True, False], ids=["bpr", "vanilla"])
def test_a_layer_takes_six_launches_forward_and_eleven_backward(batch_priority, monkeypatch):
    monkeypatch.setattr(steps, "has_kernels", lambda device: True)
    options = {"num_experts": 8, "batch_priority": batch_priority}
    # In eval mode, as losses are operators of their own.
    layer, x = MoeMlp(64, 128, **options).eval(), torch.empty(8, 49, 64, requires_grad=True)
    with _Library() as library, record(90) as launches:
        y = layer(x)
        forward = [each.name for each in launches] + library.launches
        y.backward(torch.empty_like(y))
    backward = [each.name for each in launches[6:]] + library.launches
    assert forward == [
        *("router_forward_fp32_le32", "router_sums", "select" if batch_priority else "claim"),
        *("expert_up/fp32", "expert_down/fp32", "combine"),
    ]
    assert backward == [
        *("expert_d_hidden/fp32", "output_bias", "sum_parts", "expert_d_fc2/fp32", "expert_d_fc1/fp32"),
        *("expert_d_rows/fp32", "dispatch_backward"),
        *("router_backward_tokens_fp32_le32", "router_backward_weight_fp32_le32"),
        # Of the parts of the router's gradient, and of what x gets from the router and from the experts.
        *("sum", "add"),
    ]


def test_every_kernel_and_every_table_entry_is_captured(captured):
    kernels = set()
    for module in pkgutil.walk_packages(vmoe_kernels.__path__, "vmoe_kernels."):
        found = inspect.getmembers(sys.modules.get(module.name), lambda each: isinstance(each, JITFunction))
        kernels |= {f"{each.__module__}:{name}" for name, each in found if name.endswith("_kernel")}
    for chip, every in captured.items():
        assert {each.kernel for each in every} == kernels
        for op in launch.registered_ops():
            with launch.pretend(f"sm{chip}"):
                entries = [launch.look_up(op, CPU, bucket) for bucket in ("any", "le64", "wide")]
            launched = [_options(each) for each in every if each.name.startswith(f"{op}/")]
            # The slots' table names a design, not a kernel's constants.
            for config in entries if op != "slots" else ():
                assert any(config.kwargs().items() <= options for options in launched), (op, chip, config)


def _options(each) -> set:
    options = {"num_warps": each.num_warps, "num_stages": each.num_stages, "maxnreg": each.max_registers}
    return {**each.constexprs, **options}.items()


def test_names_are_unique_and_contents_too(captured):
    for found in captured.values():
        assert len({each.name for each in found}) == len({each.content for each in found}) == len(found)
