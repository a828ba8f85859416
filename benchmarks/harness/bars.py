"""What must be reached, kernels on an H200 and models on a CPU, and how each number follows from what was measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.harness.protocol import change, exponent
from benchmarks.harness.saved import saved_bytes
from benchmarks.harness.session import Session

Value = tuple[str, float]  # a case and what was measured there


@dataclass(frozen=True)
class Bar:
    """A target: the worst case must meet it."""

    what: str
    limit: float
    stretch: float
    unit: str  # "x", "%", "us"
    higher_is_better: bool
    values: Callable[[Session], Iterable[Value]]

    def result(self, session: Session) -> dict:
        """The worst value with its case, the best one, and which targets it meets; empty where nothing was measured."""
        values = sorted(self.values(session), key=lambda value: value[1], reverse=not self.higher_is_better)
        found = {"what": self.what, "bar": self.limit, "stretch": self.stretch, "unit": self.unit}
        if not values:
            return {**found, "measured": None, "best": None, "case": None, "met": None}
        (case, worst), (_, best) = values[0], values[-1]
        return {**found, "measured": worst, "best": best, "case": case, "met": self._met(worst)}

    def _met(self, value: float) -> str:
        for name, target in (("stretch", self.stretch), ("yes", self.limit)):
            if value >= target if self.higher_is_better else value <= target:
                return name
        return "no"


def faster_than(opponent: str, direction: str) -> Callable[[Session], Iterable[Value]]:
    """The opponent's time over ours, round by round, for every case that has both."""

    def values(session: Session) -> Iterable[Value]:
        for (op, way, case, variant), samples in session.samples.items():
            theirs = session.samples.get((op, way, case, opponent))
            if (op, way, variant) == ("moe_layer", direction, "ours") and theirs is not None:
                yield case, theirs.over(samples).median

    return values


def share_outside_experts(session: Session) -> Iterable[Value]:
    """Percent of the forward that our expert MLP alone, on a ready buffer, does not take."""
    for (op, way, case, variant), samples in session.samples.items():
        alone = session.samples.get((op, way, case, "our expert MLP alone"))
        if (op, way, variant) == ("moe_layer", "forward", "ours") and alone is not None:
            yield case, 100.0 * (1.0 - alone.over(samples).median)


def slots_microseconds(session: Session) -> Iterable[Value]:
    """BPR over one group of T = 25k tokens, typical load."""
    for row in session.rows:
        if row.op == "slots" and row.variant == "ours" and "T=25088" in row.case and "G=1 random BPR" in row.case:
            yield row.case, row.median_us


def slots_worst_case(session: Session) -> Iterable[Value]:
    """All tokens to one expert over the typical load."""
    for (op, way, case, variant), samples in session.samples.items():
        usual = session.samples.get((op, way, case.replace("one expert", "random"), variant))
        if op == "slots" and variant == "ours" and "one expert" in case and usual is not None:
            yield case, samples.median / usual.median


def percent_of_cublas(session: Session) -> Iterable[Value]:
    """The layer's FLOPs per second over those of cuBLAS at its two products."""
    for row in session.rows:
        if (row.op, row.direction, row.variant) == ("moe_layer", "forward", "ours") and row.percent is not None:
            yield row.case, row.percent


def images_per_second(session: Session) -> Iterable[Value]:
    """Our model's over the dense one's."""
    for (op, way, case, variant), samples in session.samples.items():
        dense = session.samples.get((op, way, case, "dense"))
        if op == "model" and variant.startswith("ours") and dense is not None:
            yield f"{variant}, {way} {case}", dense.over(samples).median


def growth_with_tokens(session: Session) -> Iterable[Value]:
    """Exponent of the layer's time over T."""
    if "T" in session.sweeps:
        yield "log-log fit", exponent(session.sweeps["T"]).median


def change_with_experts(session: Session) -> Iterable[Value]:
    """Percent by which the slowest number of experts exceeds the fastest, at equal rows."""
    if "E" in session.sweeps:
        values = list(session.sweeps["E"])
        yield f"E={values[0]}..{values[-1]}", 100.0 * (change(session.sweeps["E"]).median - 1.0)


def memory(session: Session) -> Iterable[Value]:
    """Peak bytes of a training step over the eager reference's."""
    for (case, variant), peak in session.memory.items():
        if variant == "ours" and (case, "eager") in session.memory:
            yield case, peak / session.memory[case, "eager"]


def saved(session: Session) -> Iterable[Value]:
    """Bytes that a layer keeps for its backward over the eager reference's; counted, so known without a GPU."""
    for case in session.cases:
        yield case.name, saved_bytes(case, "auto") / saved_bytes(case, "reference")


BARS = (
    Bar(
        "layer forward vs gather + cuBLAS bmm + compiled epilogue", 1.15, 1.3, "x", True, faster_than("bmm", "forward")
    ),
    Bar("layer forward + backward vs the same", 1.10, 1.25, "x", True, faster_than("bmm", "both")),
    Bar("layer forward vs F.grouped_mm + eager", 1.3, 1.6, "x", True, faster_than("grouped_mm", "forward")),
    Bar("layer forward vs one-hot einsum dispatch", 5.0, 10.0, "x", True, faster_than("one-hot einsum", "forward")),
    Bar("share of the layer outside the expert MLP", 15.0, 8.0, "%", False, share_outside_experts),
    Bar("slots (BPR), T=25k in one group", 90.0, 25.0, "us", False, slots_microseconds),
    Bar("slots, all tokens to one expert over typical", 2.0, 1.2, "x", False, slots_worst_case),
    Bar("layer forward, share of the cuBLAS rate at its shapes", 75.0, 90.0, "%", True, percent_of_cublas),
    Bar("vmoe_b16 K=1 C=1 images/s over ViT-B/16", 0.90, 0.97, "x", True, images_per_second),
    Bar("peak training memory over the eager reference", 0.6, 0.45, "x", False, memory),
    Bar("bytes saved for the backward over the eager reference (counted)", 0.45, 0.45, "x", False, saved),
)

CPU_BARS = (
    Bar("V-MoE K=1 images/s over timm's ViT of its dims", 0.87, 0.97, "x", True, images_per_second),
    Bar("exponent of the layer's time over T", 1.03, 1.00, "", False, growth_with_tokens),
    Bar("change of the layer's time from 8 to 64 experts", 15.0, 8.0, "%", False, change_with_experts),
)


def lines(results: list[dict]) -> list[str]:
    """Markdown table; the measured value is the worst case's."""
    table = ["| what | bar | stretch | measured | best | met |", "| --- | --- | --- | --- | --- | --- |"]
    for each in results:
        unit = each["unit"]
        measured = best = met = ""
        if each["measured"] is not None:
            measured, best = f"{each['measured']:.2f} {unit} ({each['case']})", f"{each['best']:.2f} {unit}"
            met = each["met"]
        table.append(
            f"| {each['what']} | {each['bar']} {unit} | {each['stretch']} {unit} | {measured} | {best} | {met} |"
        )
    return table
