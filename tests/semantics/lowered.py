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
# Chip, kernel and complaint, each a pattern: what ttsem 0.1.0 says of kernels that are right, and why.
FALSE_ALARMS: tuple[tuple[str, str, str, str], ...] = ()


class LoweredError(AssertionError):
    """The final IR of a launch leaves other bits than the kernel, or cannot be executed."""


class LoweredToo:
    """In place of ttsem's `execute`: the first launch of each compiled kernel is executed twice."""

    def __init__(self, capability: int, text: Callable, counts: Counter) -> None:
        from ttsem import harness

        self.execute, self.target = harness.execute, harness.target_for("cpu", capability)
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
        for chip, kernel, pattern, _ in FALSE_ALARMS:
            named = (chip, str(self.capability)), (kernel, record.fn_name), (pattern, complaint)
            if all(re.search(*each) for each in named):
                self.counts["false_alarms"] += 1
                return
        self.counts["lowered_differ"] += 1
        raise LoweredError(f"{record.fn_name} on sm_{self.capability}: {complaint}")

    def _difference(self, record, run, again) -> str | None:
        for name in record.ptrs:
            want, got = run.buffer(record, name), again.buffer(record, name)
            if want is not None and not np.array_equal(want.view(np.uint8), got.view(np.uint8)):
                where = np.flatnonzero(
                    want.reshape(-1).view(f"u{want.itemsize}") != got.reshape(-1).view(f"u{got.itemsize}")
                )
                pair = want.reshape(-1)[where[:3]].tolist(), got.reshape(-1)[where[:3]].tolist()
                return f"{len(where)} of {want.size} elements of {name} differ, at {where[:3].tolist()}: {pair}"
        return None
