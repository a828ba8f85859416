"""What is read from compiled products: buffers, steps, and that loops run as they were written for."""

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.compile import pipelines
from benchmarks.compile.launches import CALLS, HEADLINE, record
from benchmarks.compile.report import build


def _code(*lines: str) -> str:
    """Machine code as cuobjdump prints it: an address and an instruction in 16 bytes each."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */" for i, line in enumerate(lines))


NESTED = _code(
    "MOV R1, c[0x0][0x28]",
    "IADD3 R2, R2, 0x1, RZ",  # 10: the outer loop
    "LDGSTS.E [R3], [R4]",  # 20: the inner loop
    "HMMA.16816.F32.BF16 R8, R12, R16, R8",
    "HMMA.16816.F32.BF16 R9, R12, R16, R9",
    "@!P0 BRA 0x20",
    "STG.E [R5], R8",
    "STG.E [R6], R9",
    "@P1 BRA 0x10",
    "EXIT",
    "BRA 0xa0",
    "NOP",
)
FLAT = _code(
    "SYNCS.ARRIVE R1",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",  # 10
    "UIADD3 UR4, UR4, 0x1, URZ",
    "@P0 BRA 0x60",
    "STG.E [R5], R24",  # The epilogue, of the last step of a tile.
    "STG.E [R6], R25",
    "IADD3 R2, R2, 0x1, RZ",  # 60
    "@P1 BRA 0x10",
    "EXIT",
)


ELECTED = _code(
    "LDGSTS.E [R3], [R4]",
    "BRA.U UP1, 0x40",  # All warps but one.
    "UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR34], tmem[UR4], idesc[UR5], !UPT",
    "UTCBAR [UR6], URZ",
    "@!P1 BRA 0x0",  # 40
    "EXIT",
)


def test_a_step_is_the_inner_loop():
    assert pipelines.step(NESTED) == pipelines.Step(4, 2)
    assert len(pipelines.instructions(NESTED)) == 11


def test_a_step_of_a_flattened_loop_leaves_the_epilogue_out():
    assert pipelines.step(FLAT) == pipelines.Step(5, 1)


def test_a_step_is_that_of_the_warp_that_multiplies():
    assert pipelines.step(ELECTED) == pipelines.Step(5, 1)


def test_code_without_a_loop_of_products_has_no_step():
    assert pipelines.step(_code("HMMA.16816.F32 R8, R12, R16, R8", "EXIT")) is None
    assert pipelines.step(_code("IADD3 R2, R2, 0x1, RZ", "@P0 BRA 0x0", "EXIT")) is None
    assert pipelines.step("") is None


def test_buffers_are_those_of_the_operand_that_has_fewest():
    alloc = "%{} = ttg.local_alloc : () -> !ttg.memdesc<{}xbf16, #shared, #smem, mutable>"
    a, b, order = alloc.format(1, "3x128x64"), alloc.format(2, "4x64x256"), alloc.format(3, "2x64")
    assert pipelines.buffers("\n".join((a, b, order))) == 3
    assert pipelines.buffers(alloc.format(1, "128x64")) == 1


@pytest.fixture(scope="module")
def dialect():
    """Op and chip to Triton's GPU dialect of the op's launch in a step of training."""

    def build_one(op: str, chip: int) -> str:
        with record(chip) as launches:
            CALLS[HEADLINE]()
        return build(next(each for each in launches if each.name == op), chip).asm["ttgir"]

    return build_one


def test_wide_tiles_run_as_one_loop_with_their_product(dialect):
    code = dialect("expert_down", 90)
    assert code.count("scf.for") == 1
    assert "async_tma_copy_global_to_local" in code
    assert pipelines.buffers(code) == 4


@pytest.mark.parametrize(("chip", "buffers"), [(80, 4), (90, 3)])
def test_weight_gradients_load_ahead_of_their_products(dialect, chip, buffers):
    code = dialect("expert_d_fc1", chip)
    assert pipelines.buffers(code) == buffers
    # What is loaded into registers first is not loaded ahead.
    assert "tt.load" not in code
    assert "tt.trans" not in code
