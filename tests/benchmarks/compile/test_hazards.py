"""Machine code in which a product's operand is overwritten while the product runs, and code in which it is not."""

import pytest

from benchmarks.compile.hazards import Operands, register_operands

PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR52], R24 ;"
LAST = "HGMMA.64x32x16.F32.BF16 R24, R44, gdesc[UR32], R24, gsb0 ;"
SHARED = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0 ;"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"


def _sass(*lines: str) -> str:
    """As `cuobjdump -sass` prints it."""
    return "\n".join(f"        /*{16 * i:04x}*/  {line}  /* 0x0 */\n  /* 0x1 */" for i, line in enumerate(lines))


def test_code_that_waits_before_it_writes_is_clean():
    # Registers of the accumulator and of other values may be written; so may the operand's, after the wait.
    code = _sass("MOV R40, R1 ;", "WARPGROUP.ARRIVE ;", PRODUCT, "MOV R48, R2 ;", LAST, WAIT, "MOV R40, R3 ;")
    assert register_operands(code) == Operands(2, ())
    assert register_operands(_sass(SHARED, "MOV R40, R3 ;", WAIT)) == Operands(0, ())


@pytest.mark.parametrize(
    "write",
    [
        "MOV R43, R3 ;",
        "LDS.128 R40, [R2+0x10] ;",
        "IMAD.WIDE R42, R3, 0x4, R8 ;",
        "@!P0 FADD R41, R3, R4 ;",
        "SHFL.BFLY PT, R40, R4, 0x1, 0x1f ;",
        "LDSM.16.M88.4 R40, [R5] ;",
        "LOP3.LUT P0, R42, R3, 0xffff0000, RZ, 0xc0, !PT ;",
        "LDG.E.64 R42, desc[UR6][R2.64] ;",
    ],
)
def test_a_write_to_an_operand_in_flight_is_found(write):
    found = register_operands(_sass(PRODUCT, write, LAST, WAIT))
    assert found.products == 2
    assert len(found.overwritten) == 1
    assert write.removesuffix(" ;").split(maxsplit=1)[-1].split()[-1] in found.overwritten[0]


@pytest.mark.parametrize(
    "read", ["STS.128 [R2], R40 ;", "ISETP.GE.AND P0, PT, R40, R41, PT ;", "FADD R39, R40, R41 ;", "BRA 0x10 ;"]
)
def test_what_only_reads_an_operand_is_clean(read):
    assert not register_operands(_sass("NOP ;", "NOP ;", PRODUCT, read, LAST, WAIT)).overwritten


def test_a_wait_for_older_groups_leaves_the_newest_in_flight():
    first, second = LAST, LAST.replace("R44", "R60")
    wait = WAIT.replace("0x0", "0x1")
    assert not register_operands(_sass(first, second, wait, "MOV R44, R1 ;")).overwritten
    assert len(register_operands(_sass(first, second, wait, "MOV R61, R1 ;")).overwritten) == 1


def test_a_product_is_in_flight_where_its_loop_begins_again():
    code = ["MOV R44, R9 ;", "MOV R50, R9 ;", LAST, "@P0 BRA 0x0 ;", WAIT, "EXIT ;"]
    assert register_operands(_sass(*code)).overwritten == ("0x0 MOV R44, R9",)
    code[0] = WAIT
    assert not register_operands(_sass(*code)).overwritten
