"""Compiles what the ops launch on sm_80, sm_90 and sm_100, as launches.py records it without a GPU, and reads it.

Of sm_86, sm_89 and sm_120 it compiles the launches that sm_80 does not share with them.

    python -m benchmarks.compile.report            writes benchmarks/results/compile_report/triton-<version>.{json,md}
    python -m benchmarks.compile.report --check    writes nothing; exit code 1 on any defect, if a report is stale, or
                                                   if a number is worse than the report of this Triton has it

Both compile only what is made from other things than in that report; without the file, everything.

A defect is stack use, local-memory instructions (spills), more shared memory than the chip has, a matrix product
without tensor-core instructions (a float32 product in full precision, "ieee", has none to use and is excepted), an
operand that is overwritten while a product reads it, or a tensor descriptor that is not read by TMA. Each Triton
version has a report of its own.
"""

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend

from benchmarks.compile import hazards, pipelines
from benchmarks.compile.launches import CAPABILITIES, SIBLINGS, Launch, capture
from benchmarks.harness import results
from vmoe_kernels.common.launch import triton_version

REPORTS = Path(__file__).parents[1] / "results" / "compile_report"
# Bytes of shared memory a block may use, and a multiprocessor has; warps and blocks that it holds (CUDA programming
# guide, compute capabilities).
SHARED_PER_BLOCK = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
SHARED_PER_SM = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
WARPS_PER_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS_PER_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_RESERVED_PER_BLOCK, REGISTERS_PER_SM = 1024, 65_536
TENSOR_MEMORY_COLUMNS = 512

# Heading of a column to the field of Compiled it shows.
COLUMNS = {
    "warps": "num_warps",
    "stages": "num_stages",
    "registers": "registers",
    "stack": "stack",
    "local": "local",
    "shared": "shared",
    "wgmma": "wgmma",
    "mma": "mma",
    "tcgen05": "tcgen05",
    "TMA": "tma",
    "blocks/SM": "blocks_per_sm",
    "buffers": "buffers",
    "step": "step",
    "products": "tensor_core",
    "all": "instructions",
}
# Numbers that must not grow, and not shrink, without a new report.
COSTS = ("registers", "stack", "local", "shared", "step", "instructions")
GAINS = ("blocks_per_sm", "buffers")
# Instructions that counts of them may grow by: the assembler of one Triton does not write the same everywhere. On two
# machines 3 of 775 compilations differed, by one instruction.
SLACK = {"step": 2, "instructions": 2}


@dataclass(frozen=True)
class Compiled:
    """What one config became on one chip."""

    name: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # local-memory loads and stores in the machine code: spills, or arrays indexed at run time
    shared: int  # bytes per block
    wgmma: int  # instructions in the PTX
    mma: int
    tcgen05: int
    tma: int  # loads by TMA in the PTX
    dots: int  # matrix products in the source that tensor cores can do
    ieee_dots: int  # float32 products in full precision
    has_dot: bool
    descriptors: int  # arguments that are tensor descriptors
    tensor_memory: int  # columns of sm_100's tensor memory
    blocks_per_sm: int  # resident at once
    buffers: int = 1  # tiles of an operand of a product that shared memory holds, 1 without a pipeline
    step: int = 0  # machine instructions of a warp from one step of a product to the next
    tensor_core: int = 0  # of those, products
    instructions: int = 0  # machine instructions in all, of a kernel with products
    register_operands: int = 0  # products on sm_90 that read an operand from registers
    overwritten: int = 0  # instructions that write to such an operand while its product may run
    made_from: str = ""  # digest of what decides all of this

    def problems(self) -> list[str]:
        """Why this config must not ship; empty if it may."""
        found = []
        if self.stack:
            found.append(f"uses {self.stack} bytes of stack")
        if self.local:
            found.append(f"spills: {self.local} local-memory instructions")
        if self.overwritten:
            found.append(f"overwrites operands of products that still run: {self.overwritten} instructions")
        limit = SHARED_PER_BLOCK[self.capability]
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, the chip has {limit}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"needs {self.tensor_memory} tensor-memory columns, the chip has {TENSOR_MEMORY_COLUMNS}")
        if self.dots and not self.wgmma + self.mma + self.tcgen05:
            found.append("multiplies matrices without tensor-core instructions")
        if self.dots and self.capability == 90 and not self.wgmma:
            found.append("multiplies matrices without wgmma")
        if self.descriptors and not self.tma:
            found.append("reads a tensor descriptor without TMA")
        if self.has_dot and not self.dots + self.ieee_dots:
            found.append("is declared to multiply matrices and has no tl.dot")
        if self.dots + self.ieee_dots and not self.has_dot:
            found.append("has a tl.dot and is not declared to multiply matrices (has_dot)")
        return [f"{self.name} on sm_{self.capability} {problem}" for problem in found]


def collect(modules: list[str]) -> list[tuple[Launch, int]]:
    """Every captured launch and its chip, or those of the kernels of some modules, each of which must have one."""
    jobs = [(each, chip) for chip in CAPABILITIES for each in capture(chip)]
    shared = {each.content for each, chip in jobs if chip == 80}
    jobs += [(each, chip) for chip in SIBLINGS for each in capture(chip) if each.content not in shared]
    if modules:
        jobs = [job for job in jobs if job[0].module in modules]
    for module in modules:
        if all(each.module != module for each, _ in jobs):
            raise ValueError(f"{module} must hold a kernel that the ops launch, got none")
    return sorted(jobs, key=lambda job: (job[0].name, job[1]))


def build(case: Launch, capability: int) -> CompiledKernel:
    """Compiles a launch for a chip.

    Raises:
        RuntimeError: under Triton's interpreter, which leaves nothing to compile.
        ValueError: if the launch names arguments that the kernel lacks, or lacks some that it has.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels compile only where TRITON_INTERPRET is not set")
    names = case.function.arg_names
    given = {**case.signature, **case.constexprs}
    if set(given) != set(names):
        raise ValueError(f"{case.name}: signature and constexprs must name {sorted(names)}, got {sorted(given)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.function, signature, dict(case.constexprs), divisible)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.max_registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def made_from(case: Launch, capability: int) -> str:
    """Digest of what decides what a launch becomes: kernels, arguments, chip, compiler, and how the result is read."""
    compiler = triton.__version__, make_backend(GPUTarget("cuda", capability, 32)).hash()
    parts = case.function.cache_key, case.content, capability, compiler, _reading()
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _reading() -> list[str]:
    sources = pipelines, hazards, build, compile_case, machine_code, blocks_per_sm
    return [inspect.getsource(each) for each in sources]


def compile_case(case: Launch, capability: int) -> Compiled:
    """What a launch becomes on a chip; raises what `build` raises."""
    binary = build(case, capability)
    registers, stack, local = machine_code(binary.asm["cubin"])
    ptx, shared = binary.asm["ptx"], binary.metadata.shared
    sass = pipelines.disassemble(binary.asm["cubin"]) if case.has_dot else ""
    step = pipelines.step(sass) or pipelines.Step(0, 0)
    # Products that go on after their instruction.
    operands = hazards.register_operands(sass if capability == 90 else "")
    dots = re.findall(r"= tt\.dot(?:_scaled)? .*", binary.asm["ttir"])
    ieee = [dot for dot in dots if "xf32> *" in dot and "inputPrecision" not in dot]
    return Compiled(
        name=case.name,
        capability=capability,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        registers=registers,
        stack=stack,
        local=local,
        shared=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        tma=ptx.count("cp.async.bulk.tensor"),
        dots=len(dots) - len(ieee),
        ieee_dots=len(ieee),
        has_dot=case.has_dot,
        descriptors=sum(kind.startswith("tensordesc") for kind in case.signature.values()),
        tensor_memory=binary.metadata.tmem_size or 0,
        # Warp-specialised kernels get more warps than they ask for.
        blocks_per_sm=blocks_per_sm(capability, registers, shared, binary.metadata.num_warps),
        buffers=pipelines.buffers(binary.asm["ttgir"]),
        step=step.instructions,
        tensor_core=step.tensor_core,
        instructions=len(pipelines.instructions(sass)),
        register_operands=operands.products,
        overwritten=len(operands.overwritten),
        made_from=made_from(case, capability),
    )


def machine_code(cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, stack bytes per thread and local-memory instructions of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = read("-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump must report the registers of the kernel, got {usage!r}")
        registers, stack, local = map(int, found.groups())
        # Local memory lies in the stack frame; disassembling takes longer than compiling, so only where there is some.
        code = read("-sass") if stack or local else ""
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", code))


def blocks_per_sm(capability: int, registers: int, shared: int, num_warps: int) -> int:
    """Blocks that a multiprocessor holds at once; registers are handed out to warps in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_PER_SM // per_warp // num_warps
    by_shared = SHARED_PER_SM[capability] // (shared + SHARED_RESERVED_PER_BLOCK)
    return min(by_registers, by_shared, WARPS_PER_SM[capability] // num_warps, BLOCKS_PER_SM[capability])


def compile_all(modules: list[str], processes: int, known: Mapping[str, Compiled] | None = None) -> list[Compiled]:
    """Compiles all captured launches, or those of the kernels of some modules, but for those that are known.

    Args:
        known: rows by what they were made from. The same is not made twice.
    """
    jobs = collect(modules)
    before = [(known or {}).get(made_from(*job)) for job in jobs]
    new = [job for job, row in zip(jobs, before) if row is None]
    # Spawned, so that no worker inherits the threads of the parent's torch.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = pool.map(compile_case, *zip(*new))
        rows = [next(made) if row is None else row for row in before]
    # What a launch is called is no part of what it is made from.
    return [dataclasses.replace(row, name=case.name) for (case, _), row in zip(jobs, rows)]


def versions() -> dict[str, str]:
    return {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}


def markdown(rows: list[Compiled]) -> str:
    """The report as a table, one row per config and chip."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Compile report",
        "",
        f"Written by `python -m benchmarks.compile.report` with {made}; no GPU was used. Registers and stack bytes are",
        "per thread, shared memory and blocks per multiprocessor per block. Local counts local-memory instructions",
        "(spills). wgmma, mma, tcgen05 and TMA count instructions in the PTX; a product marked ieee is float32 in full",
        "precision, which has no tensor-core instruction. Of products: buffers are the tiles of an operand that shared",
        "memory holds, step the machine instructions of a warp from one step of the sum to the next, products those of",
        "tensor cores among them, all those of the kernel.",
        "",
        f"| kernel, config | chip | {' | '.join(COLUMNS)} |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for row in rows:
        name = f"{row.name} (ieee)" if row.ieee_dots and not row.dots else row.name
        values = " | ".join(str(getattr(row, field)) for field in COLUMNS.values())
        lines.append(f"| {name} | sm_{row.capability} | {values} |")
    return "\n".join(lines) + "\n"


def write(rows: list[Compiled], folder: Path = REPORTS) -> None:
    """Writes the report of the installed Triton as JSON and Markdown."""
    content = {"versions": versions(), "rows": [dataclasses.asdict(row) for row in rows]}
    results.write(folder, f"triton-{triton_version()}", content, markdown(rows).splitlines())


def staleness(rows: list[Compiled], folder: Path = REPORTS) -> list[str]:
    """Whether a committed report lists other configs than there are; numbers may differ with Triton's version."""
    now = {(row.name, row.capability) for row in rows}
    files = sorted(folder.glob("triton-*.json"))
    found = [] if files else [f"{folder.name} holds no report; run python -m benchmarks.compile.report"]
    for file in files:
        listed = {(row["name"], row["capability"]) for row in json.loads(file.read_text())["rows"]}
        found += [
            f"{name} on sm_{chip} {what} {file.stem}; run python -m benchmarks.compile.report with that version"
            for what, keys in (("is missing in", now - listed), ("is gone but listed in", listed - now))
            for name, chip in sorted(keys)
        ]
    return found


def reported(folder: Path = REPORTS) -> dict[str, Compiled]:
    """Rows of the installed Triton's report, by what they were made from; empty without a report."""
    file = folder / f"triton-{triton_version()}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {row["made_from"]: Compiled(**row) for row in rows if "made_from" in row}


def worse(rows: list[Compiled], folder: Path = REPORTS) -> list[str]:
    """Numbers that are worse, by more than their slack, than the committed report of the very same Triton has them."""
    file = folder / f"triton-{triton_version()}.json"
    if not file.exists():
        return []
    committed = json.loads(file.read_text())
    if committed["versions"]["triton"] != triton.__version__:
        return []
    before = {(row["name"], row["capability"]): row for row in committed["rows"]}
    found = []
    for row in rows:
        old = before.get((row.name, row.capability), {})
        for field in (*COSTS, *GAINS):
            now, then = getattr(row, field), old.get(field, getattr(row, field))
            if (now > then + SLACK.get(field, 0)) if field in COSTS else (now < then):
                found.append(
                    f"{row.name} on sm_{row.capability} has {field} {now}, in {file.stem} {then}; where that is meant, "
                    "run python -m benchmarks.compile.report"
                )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "write nothing; fail on any defect, a stale report, or a number that got worse"
    parser.add_argument("--check", action="store_true", help=what)
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("modules", nargs="*", help="modules whose kernels are compiled (default: all)")
    options = parser.parse_args(arguments)
    known = reported()
    rows = compile_all(options.modules, options.processes, known)
    problems = [problem for row in rows for problem in row.problems()]
    if options.check:
        problems += worse(rows)
        problems += staleness(rows) if not options.modules else []
    elif not options.modules:
        write(rows)
    else:
        print(markdown(rows))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(
        f"sm_90: {sum(row.register_operands for row in rows)} products read an operand from registers, "
        f"{sum(row.overwritten for row in rows)} instructions overwrite one while it is read"
    )
    compiled = sum(row.made_from not in known for row in rows)
    configs = len({row.name for row in rows})
    print(f"{len(rows)} compilations of {configs} configs, {compiled} made now, {len(problems)} defects")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
