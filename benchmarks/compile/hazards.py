"""Machine code of sm_90 in which an operand of a running product is overwritten, as ptxas before 13.3 may leave it.

wgmma runs on after its instruction: a left operand that it reads from registers must stay there until a wait for its
group. Triton puts what it computed (the parts of a float32 operand, say) there, and ptxas allocates registers without
regard to products in flight (triton issues 9433 and 11781). Nothing but the machine code shows whether that happened.
"""

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
# HGMMA.64x32x16.F32.BF16 accumulator, left operand, right operand in shared memory, accumulator, the group it closes.
_PRODUCT = re.compile(r"R(\d+), R(\d+), gdesc")
_WAIT = re.compile(r"gsb\d+, 0x([0-9a-f]+)")
# A left operand of 64 x 16 two-byte or 64 x 8 four-byte values, of 128 threads.
_OPERAND = 4
_PREDICATES = re.compile(r"(?:!?U?P[T0-9]+\s*,\s*)*R(\d+)\b(?!\.64\])")
# Their first register is a source.
_NO_RESULT = ("ST", "RED", "BAR", "BRA", "EXIT", "NOP", "WARPGROUP", "MEMBAR", "FENCE", "SYNCS", "UTMA", "LDGSTS")


@dataclass(frozen=True)
class Operands:
    """What a kernel's products read from registers."""

    products: int
    """Products whose left operand is in registers."""
    overwritten: tuple[str, ...]
    """Instructions that write to such an operand while its product may still read it."""


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    operands: str

    @property
    def written(self) -> range:
        """Numbers of the registers of its result."""
        kind = self.name.partition(".")[0]
        found = _PREDICATES.match(self.operands)
        if found is None or kind.startswith(_NO_RESULT) or kind.endswith(("SETP", "GMMA")):
            return range(0)
        first = int(found[1])
        return range(first, first + _width(self.name))


def _width(name: str) -> int:
    """Registers of a result."""
    parts = name.split(".")
    if parts[0] == "LDSM":
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if "128" in parts or (parts[0] in ("HMMA", "QMMA") and "F32" in parts[1:3]):
        return 4
    wide = "64" in parts or "WIDE" in parts or parts[0] in ("DADD", "DMUL", "DFMA")
    return 2 if wide or (parts[0] == "CS2R" and "32" not in parts) else 1


def register_operands(sass: str) -> Operands:
    """Reads the machine code of a kernel, as `cuobjdump -sass` prints it."""
    code = [_Instruction(int(at, 16), name, operands) for at, name, operands in _INSTRUCTION.findall(sass)]
    index = {each.address: i for i, each in enumerate(code)}
    products = {
        i: int(found[2])
        for i, each in enumerate(code)
        if "GMMA" in each.name and (found := _PRODUCT.match(each.operands))
    }
    overwritten: dict[int, str] = {}
    # From the top, and from the head of each loop with what is in flight at its end.
    runs: list[tuple[range, list[set[int]]]] = [(range(len(code)), [set()])]
    for number, (run, groups) in enumerate(runs):
        groups = [set(group) for group in groups]
        for i in run:
            each = code[i]
            if any(register in group for group in groups for register in each.written):
                overwritten[i] = f"{each.address:#x} {each.name} {each.operands}"
            if "GMMA" in each.name:
                if i in products:
                    groups[-1].update(range(products[i], products[i] + _OPERAND))
                if "gsb" in each.operands:
                    groups.append(set())
            elif each.name.startswith("WARPGROUP.DEPBAR"):
                left = int(_WAIT.search(each.operands)[1], 16)
                # The last group is open, and the wait is not for it.
                groups = groups[max(len(groups) - 1 - left, 0) :]
            elif each.name == "BRA" and number == 0 and any(groups):
                target = re.search(r"0x([0-9a-f]+)", each.operands)
                head = index.get(int(target[1], 16)) if target else None
                if head is not None and head <= i:
                    runs.append((range(head, i + 1), groups))
    return Operands(len(products), tuple(overwritten[i] for i in sorted(overwritten)))
