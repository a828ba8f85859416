"""Pytest plugin: tests/gpu on a CPU, every launch of a Triton kernel executed and judged by ttsem.

    python -m pytest -p tests.semantics.plugin tests/gpu                     all, for sm_90
    python -m pytest -p tests.semantics.plugin --chip 80 tests/gpu           compiled and chosen for sm_80
    python -m pytest -p tests.semantics.plugin --lowered tests/semantics     each kernel's final TTGIR, executed as well
    python -m pytest -p tests.semantics.plugin --part quick tests/gpu        a few minutes of it, as `make test` has it

A table at the end says how many tests and launches there were, and how many faults and races: each of them fails its
test as well. `--write` keeps it in results.md, a section for each chip, if all tests passed. Without ttsem or with
another Triton every test is skipped, with the reason.
"""

import importlib.metadata
import re
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.semantics.judge import judged, missing

RESULTS = Path(__file__).with_name("results.md")
HEAD = """# What ttsem found

Written by `make test-semantics`: the GPU tests, each launch compiled for a chip, executed on the CPU and judged.
"""
# Tests that a CPU cannot answer, by a pattern of their names, and why. The first that matches counts.
LEFT_OUT = {
    r"in_a(_cuda)?_graph": "captures a CUDA graph",
    r"synchronise|waits_for_(the_gpu|nothing)": "asks CUDA whether the host waited",
    r"2_to_the_31": "needs more memory than there is",
    r"test_doctor_gpu": "measures a GPU, and asks for NCCL",
    r"equal_in_two_runs": "programs run one after the other here: two runs cannot differ",
    r"library_gemms": "cuBLAS multiplies, at sizes that take a CPU too long",
    r"25088|\(8, 412, |1576, 2, 32|test_(slots_keep|rows_hold)\w*\[size([4-7]|9|1\d)-": "takes an interpreter too long",
    # Minutes each; one in float32 and, for each size, one in bfloat16 are kept.
    r"router_equals_reference\[size([89]|7-0)|16_bits\[size[789]-(?!dtype0-True-1)": "takes an interpreter too long",
}
# What `--part quick` keeps, by a pattern of the test's name.
QUICK = (
    r"semantics/test_judge|as_the_chip_has_them|configs\.py::test_(rows|slots)",
    r"test_(dispatch|combine)_gpu",
    r"(moe_mlp|dropless)_gpu.*(13|67, 2).*bfloat16|idle|drops_as.*bfloat16|test_slots_equal",
    r"test_expert_mlp_matches.*(relu|gelu_tanh)-torch.bfloat16",
    r"router_equals.*\[(size[123]-|dtype0-)|router_equals.*bfloat16.*size[123]|each_16_bit.*size0",
    r"test_(slots_keep\w*\[size[0-3]-\w+-\w+-max|rows_hold\w*\[size[23]-)",
)


def why_left_out(name: str) -> str | None:
    """Why a test is not run, or None."""
    return next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, name)), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("semantics")
    group.addoption("--chip", type=int, default=90, choices=(80, 90, 100), help="capability that is compiled for")
    group.addoption("--part", choices=("all", "quick"), default="all", help="how much of tests/gpu is run")
    group.addoption("--lowered", action="store_true", help="execute the final TTGIR, too: it must leave the same bits")
    group.addoption("--write", action="store_true", help="keep the table in results.md if all tests pass")


class Judging:
    """The session of one process, and the counts of all of them in the one that prints."""

    def __init__(self, chip: int, part: str, lowered: bool, write: bool) -> None:
        self.part, self.lowered, self.write = part, lowered, write
        self.missing = missing()
        self.stack = ExitStack()
        self.counts = Counter() if self.missing else self.stack.enter_context(judged(chip, lowered))
        self.chip = chip
        self.files: dict[str, Counter] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.missing:
            for item in items:
                item.add_marker(pytest.mark.skip(reason=self.missing))
            return
        kept = [
            item
            for item in items
            if not why_left_out(item.nodeid)
            and (self.part == "all" or any(re.search(pattern, item.nodeid) for pattern in QUICK))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        before, started = Counter(self.counts), time.process_time()
        try:
            return (yield)
        finally:
            seconds = {"seconds": time.process_time() - started}
            item.user_properties.append(("judged", {**(self.counts - before), **seconds}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            counts = self.files.setdefault(report.nodeid.partition("::")[0], Counter())
            counts.update(dict(report.user_properties).get("judged", {}))
            counts.update(["tests", "failed"] if report.failed else ["tests"])

    def pytest_terminal_summary(self, terminalreporter, exitstatus: int) -> None:
        if not self.files:
            return
        kind = "every GPU test" if self.part == "all" else "a part of the GPU tests"
        title = f"sm_{self.chip}, {'the final TTGIR, too' if self.lowered else kind}"
        terminalreporter.section(f"Under ttsem: {title}")
        terminalreporter.write_line(found := table(self.files))
        if self.write and exitstatus == 0:
            versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "ttsem", "torch"))
            text = RESULTS.read_text() if RESULTS.exists() else HEAD
            RESULTS.write_text(with_section(text, title, f"With {versions}.\n\n{found}\n"))

    def pytest_unconfigure(self) -> None:
        self.stack.close()


COLUMNS = {
    "tests": ("tests",),
    "failed": ("failed",),
    "launches": ("launches",),
    "out of bounds": ("oob_write", "oob_read"),
    "races": ("race",),
    "undefined": ("poison",),
    "not judged": ("unsupported", "error"),
    "races not looked for": ("unchecked",),
    "TTGIR": ("lowered",),
    "of it unequal": ("lowered_differ",),
    "rounded otherwise": ("rounded",),
    "seconds of CPU": ("seconds",),
}


def table(files: dict[str, Counter]) -> str:
    """Counts by file and in all, as Markdown."""
    total = sum(files.values(), Counter())
    lines = [f"| file | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, counts in [*sorted(files.items()), ("all", total)]:
        lines.append(
            f"| {name} | {' | '.join(f'{sum(counts[key] for key in keys):.0f}' for keys in COLUMNS.values())} |"
        )
    return "\n".join(lines)


def with_section(text: str, title: str, body: str) -> str:
    """Markdown with a section in the place of the one of its title, the sections in the order of their titles."""
    head, *sections = text.split("\n## ")
    others = [section for section in sections if section.partition("\n")[0] != title]
    return "\n## ".join([head, *sorted([*others, f"{title}\n\n{body}"])])


def pytest_configure(config: pytest.Config) -> None:
    options = (config.getoption(name) for name in ("--chip", "--part", "--lowered", "--write"))
    config.pluginmanager.register(Judging(*options), "semantics")
