"""A line of a table of ratios: against a bar, beside one without a bar, or the reason why nothing was measured."""

from dataclasses import dataclass

from benchmarks.harness.protocol import Samples

HEAD = ["| what | bar | measured | |", "| --- | --- | --- | --- |"]


@dataclass(frozen=True)
class Entry:
    """What a ratio may be at most, and what was measured: median, 20% and 80% quantile."""

    what: str
    limit: float | None = None  # None: no bar, the number stands for itself
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @classmethod
    def of(cls, what: str, limit: float | None, ratio: Samples, note: str = "") -> "Entry":
        """From a ratio's samples."""
        return cls(what, limit, ratio.median, ratio.quantile(0.2), ratio.quantile(0.8), note)

    @property
    def verdict(self) -> str:
        """ "passed", "missed", or nothing where there is no bar or no number."""
        if self.limit is None or self.measured is None:
            return ""
        return "passed" if self.measured <= self.limit else "missed"

    def line(self) -> str:
        """A row of Markdown."""
        limit = "" if self.limit is None else f"{self.limit:.2f}"
        measured = "not measured" if self.measured is None else f"{self.measured:.3f}"
        if self.low != self.high:
            measured += f" ({self.low:.3f}..{self.high:.3f})"
        said = "; ".join(part for part in (self.verdict, self.note) if part)
        return f"| {self.what} | {limit} | {measured} | {said} |"
