"""Which tiles the experts' products take: wide ones where a chip, a shape and the rows allow, else the chip's own."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import vmoe_kernels as kernels
from benchmarks.compile.launches import CALLS, HEADLINE, record
from vmoe_kernels.experts import triton_gemm
from vmoe_kernels.experts.triton_buffer import Buffer
from vmoe_torch.doctor.ops import SIZES

LINEAR = {"expert_up", "expert_down", "expert_d_rows"}
BF16 = torch.bfloat16


def _step(width: int, hidden: int, rows: int, shift: int = 0, drop: float = 0.0) -> None:
    """A step of training of two experts, on tensors that nothing fills."""

    def leaf(*shape: int, shift: int = 0) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return torch.empty(size + shift, dtype=BF16)[shift:].view(shape).requires_grad_()

    slots, gates = torch.empty(128, 2, dtype=torch.int32), torch.empty(128, 2)
    weights = leaf(2, hidden, width, shift=shift), None, leaf(2, width, hidden), None
    seed = torch.zeros((), dtype=torch.int64)
    y = kernels.moe_mlp(leaf(128, width), slots, gates, *weights, rows_per_expert=rows, drop=drop, seed=seed)
    y.backward(torch.empty_like(y))


def _wide(launches) -> set[str]:
    return {each.name.partition("/")[0] for each in launches if each.constexprs.get("BLOCK_COLS") == 256}


@pytest.mark.parametrize(
    ("chip", "arguments", "wide"),
    [
        (90, {}, LINEAR),
        (100, {}, LINEAR),
        (80, {}, set()),
        (86, {}, set()),
        (120, {}, set()),
        (90, {"width": 384, "hidden": 1536}, {"expert_up"}),  # 384 columns are no two of 256
        (90, {"width": 768, "hidden": 3100}, set()),  # 3,100 are no steps of 64
        (90, {"rows": 64}, set()),
        (90, {"rows": 161}, set()),  # 256 choices fill less than four of five
        (90, {"rows": 160}, LINEAR),
        (90, {"shift": 4}, {"expert_down"}),  # TMA does not read the first weight
        (90, {"drop": 0.1}, LINEAR - {"expert_up"}),  # dropout has tiles of its own
        (90, {"width": 256, "hidden": 256}, set()),  # 2 tiles of rows are less than two for each multiprocessor
    ],
)
def test_tiles_are_wide_where_they_may_be(chip, arguments, wide):
    with record(chip) as launches:
        _step(**{"width": 768, "hidden": 3072, "rows": 128, **arguments})
    assert {each.name.partition("/")[0] for each in launches} >= LINEAR
    assert _wide(launches) == wide
    for each in launches:
        if each.name.partition("/")[0] in wide:
            assert each.constexprs["PERSISTENT"]
            assert each.constexprs["TMA"]


@pytest.mark.parametrize(("chip", "multiprocessors"), [(90, 132), (100, 148)])
def test_the_doctor_checks_wide_tiles_where_a_card_has_them(chip, multiprocessors, monkeypatch):
    monkeypatch.setattr(triton_gemm, "_multiprocessors", lambda device: multiprocessors)
    found = set()
    for sizes in SIZES["cuda"]:
        leaf = partial(torch.empty, dtype=BF16, requires_grad=True)
        slots, gates = torch.empty(sizes.tokens, sizes.selected, dtype=torch.int32), leaf(sizes.tokens, sizes.selected)
        up, down = (sizes.experts, sizes.hidden, sizes.width), (sizes.experts, sizes.width, sizes.hidden)
        with record(chip) as launches:
            weights = leaf(*up), None, leaf(*down), None
            x = leaf(sizes.tokens, sizes.width)
            y = kernels.moe_mlp(x, slots, gates.float(), *weights, rows_per_expert=sizes.capacity)
            y.backward(torch.empty_like(y))
        found |= _wide(launches)
    assert found == LINEAR


def test_products_of_float32_have_tables_by_their_precision():
    for call, table in (("routed/fp32/gelu/768x3072", "fp32"), ("routed/tf32/gelu/768x3072", "tf32")):
        with record(90) as launches:
            CALLS[call]()
        precise = {each.constexprs["PRECISION"] for each in launches if each.name.endswith(f"/{table}")}
        assert precise == {"ieee" if table == "fp32" else "tf32"}
        assert sum(each.name.endswith(f"/{table}") for each in launches) == 6


@pytest.mark.parametrize(("chip", "ahead"), [(80, 4), (86, 3), (89, 3), (120, 3), (90, 2), (100, 2)])
def test_weight_gradients_load_as_far_ahead_as_their_chip_has_room_for(chip, ahead):
    with record(chip) as launches:
        CALLS[HEADLINE]()
    assert [each.constexprs["AHEAD"] for each in launches if "AHEAD" in each.constexprs] == [ahead, ahead]


def test_a_dropless_buffer_ends_where_the_last_expert_does():
    spans = torch.tensor([[0, 128, 128], [100, 128, 300]], dtype=torch.int32)
    buffer = Buffer(3, 640, torch.empty(100, 2, dtype=torch.int32), spans=spans)
    assert buffer.end == 300
    assert buffer.mostly_filled
    whole = Buffer(3, 640)
    assert whole.end is None
    assert whole.mostly_filled
    assert not Buffer(3, 640, torch.empty(100, 2, dtype=torch.int32)).mostly_filled
