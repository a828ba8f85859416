"""How a compiled product runs: the depth of its pipeline, and the instructions from one of its steps to the next.

Read from Triton's GPU dialect and from the machine code. A step is the way from a tensor-core instruction back to
itself along which there are fewest instructions: in a loop that tiles and products share (flattened), it leaves the
epilogue out.
"""

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_LEAVES = re.compile(r"\b(?:BRA|EXIT|RET)\b")
_BUFFERS = re.compile(r"ttg\.local_alloc\b.*memdesc<(\d+)x\d+x\d+x\w")


class Step(NamedTuple):
    """Of a product's loop."""

    instructions: int
    """From one step to the next, those of tensor cores included."""
    tensor_core: int
    """Those of tensor cores."""


def disassemble(cubin: bytes) -> str:
    """The machine code of a compiled kernel, as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def buffers(ttgir: str) -> int:
    """Tiles of an operand that shared memory holds at once, of the operand that has fewest: 1 without a pipeline."""
    return min((depth for depth in map(int, _BUFFERS.findall(ttgir)) if depth > 1), default=1)


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction, without the padding behind the last."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]


def step(sass: str) -> Step | None:
    """The shortest step of the products in a kernel's machine code; None if no loop has any."""
    blocks = _blocks(instructions(sass))
    cycles = (_cycle(blocks, start) for start, block in blocks.items() if block.tensor_core)
    return min((cycle for cycle in cycles if cycle is not None), default=None)


class _Block(NamedTuple):
    """Instructions that follow each other without a branch."""

    instructions: int
    tensor_core: int
    next: tuple[int, ...]


def _blocks(code: list[tuple[int, str]]) -> dict[int, _Block]:
    """Address of a block's first instruction to the block."""
    targets = {int(target, 16) for _, text in code for target in re.findall(r"\bBRA\b.*?(0x[0-9a-f]+)", text)}
    ends = [i for i, (_, text) in enumerate(code) if _LEAVES.search(text)]
    firsts = sorted({0} | {i + 1 for i in ends} | {i for i, (address, _) in enumerate(code) if address in targets})
    found = {}
    for first, past in zip(firsts, [*firsts[1:], len(code)]):
        if first >= len(code):
            continue
        last = code[past - 1][1]
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", last)
        after = [int(branch[1], 16)] if branch else []
        # What has no predicate always leaves; uniform branches name theirs behind.
        if re.match(r"\s*(?:@|BRA\.U\b)", last) or not _LEAVES.search(last):
            after += [code[past][0]] if past < len(code) else []
        products = sum(bool(_TENSOR_CORES.search(text)) for _, text in code[first:past])
        found[code[first][0]] = _Block(past - first, products, tuple(after))
    return found


def _cycle(blocks: dict[int, _Block], start: int) -> Step | None:
    """The shortest way from a block back to itself."""
    queue = [(*blocks[start][:2], start)]
    seen: set[int] = set()
    while queue:
        length, products, place = heapq.heappop(queue)
        for after in blocks[place].next if place in blocks else ():
            if after == start:
                return Step(length, products)
            if after not in seen and after in blocks:
                seen.add(after)
                heapq.heappush(
                    queue, (length + blocks[after].instructions, products + blocks[after].tensor_core, after)
                )
    return None
