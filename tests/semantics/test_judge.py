"""The judge finds faults that are put in front of it: without these tests its silence would mean nothing."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.semantics import judge
from tests.semantics.judge import compiled
from tests.semantics.lowered import LoweredError
from tests.semantics.plugin import with_section


@triton.jit
def _double(x, out, count, BLOCK: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr):
    """out = 2 x; program p owns the elements from p * STEP."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = at < count if MASKED else None
    tl.store(out + at, tl.load(x + at, mask=mask) * 2, mask=mask)


@triton.jit
def _last_wins(out):
    tl.store(out, tl.program_id(0))


def _run(count: int, *, masked: bool = True, step: int = 16, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.arange(count, device="cuda").to(dtype)
    out = torch.empty(count, device="cuda", dtype=dtype)
    _double[(-(-count // step),)](x, out, count, BLOCK=16, MASKED=masked, STEP=step)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kernel_without_fault_computes(dtype):
    assert torch.equal(_run(37, dtype=dtype), torch.arange(37).to(dtype) * 2)


def test_reads_and_writes_past_the_end_are_found():
    _run(32, masked=False)
    with (
        judge.judged(90) as counts,
        pytest.raises(Exception, match=r"test_judge\.py:\d+: tl\.store.* reads 11 element"),
    ):
        _run(37, masked=False)
    assert counts == {"launches": 1, "oob_read": 1}


def test_races_are_found():
    with (
        judge.judged(90) as counts,
        pytest.raises(Exception, match=r"program instances .* both touch element 0 of `out`"),
    ):
        _last_wins[(2,)](torch.zeros(1, device="cuda", dtype=torch.int32))
    assert counts == {"launches": 1, "race": 1}


@triton.jit
def _second_matrix(matrices, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    tile = matrices.load([1, 0, 0]).reshape(ROWS, COLS).trans(1, 0)
    tl.store(out + tl.arange(0, COLS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], tile)


def test_descriptors_are_loaded():
    x = torch.arange(3 * 8 * 16, device="cuda", dtype=torch.float32).view(3, 8, 16)
    out = torch.empty(16, 8, device="cuda")
    _second_matrix[(1,)](TensorDescriptor.from_tensor(x, [1, 8, 16]), out, ROWS=8, COLS=16)
    assert torch.equal(out, x[1].t())


def test_memory_that_nobody_wrote_is_nan():
    out = torch.empty(40, device="cuda")
    _double[(1,)](torch.ones(40, device="cuda"), out, 40, BLOCK=16, MASKED=True, STEP=16)
    assert torch.equal(out[:16], torch.full((16,), 2.0))
    assert out[16:].isnan().all()


def test_another_result_of_the_final_ir_is_found(monkeypatch):
    def tampered(record, stage, target, known):
        text = compiled(record, stage, target, known)
        return text.replace("2.000000e+00", "3.000000e+00") if stage == "ttgir" else text

    monkeypatch.setattr(judge, "compiled", tampered)
    with judge.judged(90, lowered=True) as counts, pytest.raises(LoweredError, match=r"_double on sm_90: 15 of 16"):
        _run(16)
    assert counts == {"launches": 1, "lowered": 1, "lowered_differ": 1}


def test_a_table_takes_the_place_of_its_own():
    text = "# Head\n\nwords\n"
    for title, body in (("sm_90", "first\n"), ("sm_80", "other\n"), ("sm_90", "second\n")):
        text = with_section(text, title, body)
    assert text == "# Head\n\nwords\n\n## sm_80\n\nother\n\n## sm_90\n\nsecond\n"
