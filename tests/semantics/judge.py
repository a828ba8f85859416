"""Our kernels under ttsem: what Triton compiles of a launch is executed on a CPU, and every access of memory is judged.

ttsem (a development dependency, pinned in constraints.txt) takes the place of `JITFunction.run`. Each launch is lowered
to Triton's IR for a chip that need not be there and executed program by program on the tensors' memory, bfloat16
included. An access outside of its tensors, an element that two programs of the grid touch while one of them writes it,
and an operation without a defined result are errors that name the line. What `torch.empty` returns is NaN.
"""

import functools
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch

from vmoe_kernels.common import launch

# ttsem reads what this Triton's printer writes.
TRITON = "3.8"
INSTALL = "pip install --no-deps --ignore-requires-python -c constraints.txt ttsem"


def missing() -> str | None:
    """Why nothing can be judged here, in words, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if launch.triton_version() != TRITON:
        return f"ttsem reads the IR of Triton {TRITON}, this is {importlib.metadata.version('triton')}"
    if importlib.util.find_spec("ttsem") is None:
        return f"needs ttsem: {INSTALL}"
    return None


def compiled(record, stage: str, target, known: dict[str, str]) -> str:
    """The IR of a launch after a stage of Triton's, "ttir" or "ttgir"; `known` are those of former launches.

    ttsem's own `ir_for_launch` compiles down to machine code on its way, which takes longer than all the rest.
    """
    from ttsem import harness

    specialised = harness._specialize(record.fn, record.args, record.kwargs, target)
    key = repr((record.fn.__module__, record.fn_name, specialised, stage, target))
    if key not in known:
        harness.mlir.enable_generic_printing()
        known[key] = harness.mlir.to_generic(harness._stage_text(record, stage, target), None)
    return known[key]


@contextmanager
def judged(capability: int, lowered: bool = False) -> Iterator[Counter]:
    """Every launch in the block is executed and judged, on tensors that pretend to be on a GPU.

    Args:
        capability: of the chip that is compiled for and whose launch tables are asked: 80, 90, 100.
        lowered: whether the first launch of each compiled kernel is executed in Triton's GPU dialect, too, and must
            leave the same bits; see `lowered.py`.

    Yields:
        How many launches there were, how many of them were too large to be searched for races, and how many had each
        kind of fault ("oob_write", "oob_read", "race", "poison", "unsupported"): those raise, too.
    """
    from ttsem import harness, ops, sanitize

    from benchmarks.compile.launches import AsOnCuda
    from tests.semantics.lowered import LoweredToo

    counts: Counter = Counter()
    texts: dict[str, str] = {}

    def count(stop: Exception) -> None:
        counts[stop.fault.kind if isinstance(stop, sanitize.KernelFault) else stop.verdict] += 1

    def text(record, stage: str, target) -> str:
        return compiled(record, stage, target, texts)

    load = ops.OPS["tt.descriptor_load"]

    def loaded(interp, op, args) -> list:
        return [block.reshape(kind.shape) for block, kind in zip(load(interp, op, args), op.result_types)]

    def properties(device=None) -> SimpleNamespace:
        major, minor = divmod(capability, 10)
        memory = {"shared_memory_per_block_optin": 227 * 1024, "total_memory": 2**34}
        return SimpleNamespace(name=f"pretended sm_{capability}", major=major, minor=minor, **memory)

    with ExitStack() as stack:
        stack.enter_context(patch.object(harness, "ir_for_launch", text))
        # Triton drops axes of size 1 from what a descriptor loads; ttsem 0.1.0 leaves them there.
        stack.enter_context(patch.dict(ops.OPS, {"tt.descriptor_load": loaded}))
        stack.enter_context(patch.object(harness.mlir, "parse", functools.cache(harness.mlir.parse)))
        if lowered:
            stack.enter_context(patch.object(harness, "execute", LoweredToo(capability, text, counts)))
        session = sanitize.session(
            capability,
            on_stop=count,
            on_launch=lambda _: counts.update(["launches"]),
            on_unchecked=lambda: counts.update(["unchecked"]),
        )
        stack.enter_context(session)
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", properties))
        stack.enter_context(launch.pretend(f"sm{capability}"))
        stack.enter_context(AsOnCuda())
        yield counts
