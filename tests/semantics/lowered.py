"""What Triton makes of a kernel for a chip, its final GPU dialect (TTGIR), executed beside the kernel itself.

Layouts, shared memory, asynchronous copies, pipelines, TMA, wgmma and tcgen05 are in TTGIR; barriers between the warps
of a program are executed as if nothing could overtake anything, so a missing one is not found.
"""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

# ttsem 0.1.0 looks for the first column of a slice of sm_100's tensor memory under another name than Triton 3.8 gives
# it, and takes 0 instead.
_MISREAD = re.compile(r'("ttng\.tmem_subslice"\([^)]*\) <\{)N =')
# The lowering makes three TF32 products of one of float32 ("tf32x3"), which round in other places: kernels that may,
# and how far off they may then be, relative to the largest element of a float32 result.
_ROUNDED, _ALLOWED = re.compile(r"_router_(kernel|weight_kernel)"), 2.0**-16


class LoweredError(AssertionError):
    """The final IR of a launch leaves other bits than the kernel, or cannot be executed."""


class LoweredToo:
    """In place of ttsem's `execute`: the first launch of each compiled kernel is executed twice.

    Within another one it alone looks: the judge's own tests are run by the judge.
    """

    def __init__(self, capability: int, text: Callable, counts: Counter) -> None:
        from ttsem import harness

        outer = harness.execute
        self.execute = outer.execute if isinstance(outer, LoweredToo) else outer
        self.target = harness.target_for("cpu", capability)
        self.capability, self.text, self.counts = capability, text, counts
        self.seen: set[str] = set()

    def __call__(self, record, ir: str, **options):
        """Runs a launch from its TTIR; the result is that run's."""
        run = self.execute(record, ir, **options)
        if run.failure is None:
            lowered = _MISREAD.sub(r"\1offset =", self.text(record, "ttgir", self.target))
            if lowered not in self.seen:
                self.seen.add(lowered)
                self._compare(record, run, lowered)
        return run

    def _compare(self, record, run, lowered: str) -> None:
        again = self.execute(record, lowered)
        if again.failure is not None:
            complaint = f"{again.failure.verdict}: {again.failure.message}"
        else:
            complaint = self._difference(record, run, again)
        self.counts["lowered"] += 1
        if complaint is None:
            return
        self.counts["lowered_differ"] += 1
        raise LoweredError(f"{record.fn_name} on sm_{self.capability}: {complaint}")

    def _difference(self, record, run, again) -> str | None:
        for name in record.ptrs:
            want, got = (each.buffer(record, name).reshape(-1) for each in (run, again))
            differ = want.view(np.uint8).reshape(want.size, -1) != got.view(np.uint8).reshape(want.size, -1)
            where = np.flatnonzero(differ.any(1))
            if where.size == 0:
                continue
            if want.dtype == np.float32 and _ROUNDED.search(record.fn_name):
                self.counts["rounded"] += 1
                if np.abs(want - got).max() <= _ALLOWED * np.abs(want).max():
                    continue
            values = want[where[:3]].tolist(), got[where[:3]].tolist()
            return f"{where.size} of {want.size} elements of {name} differ, at {where[:3].tolist()}: {values}"
        return None
