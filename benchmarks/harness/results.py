"""What a measurement is, and the files it goes to: benchmarks/results/<machine>/<name>.{json,md}."""

import argparse
import dataclasses
import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.protocol import Samples

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Ceiling:
    """A rate that was measured in the same run, and what it counts: "flops" or "bytes", per second."""

    name: str
    rate: float
    counts: str


@dataclass(frozen=True)
class Row:
    """One variant of one op at one shape."""

    op: str  # "dispatch"
    direction: str  # "forward", "backward" or "both"
    case: str  # the shape
    variant: str  # "ours", "eager", ...
    median_us: float
    low_us: float  # 20% quantile
    high_us: float  # 80% quantile
    runs: int
    bytes: int | None = None  # fewest that the op must move: inputs read once, outputs written once
    flops: int | None = None
    ceiling: str | None = None  # which measured rate `percent` refers to
    percent: float | None = None

    @property
    def rate(self) -> str:
        """FLOP/s of a product, bytes/s of what is bound by memory."""
        of_copy = self.ceiling == "copy" or not self.flops
        work, unit = (self.bytes, "B/s") if of_copy else (self.flops, "FLOP/s")
        if not work:
            return ""
        giga = work / self.median_us * 1e-3
        return f"{giga:.1f} G{unit}" if giga < 1000 else f"{giga * 1e-3:.2f} T{unit}"


@dataclass(frozen=True)
class Limit:
    """What a ratio may be at most, and what was measured: median, 20% and 80% quantile."""

    what: str
    limit: float
    measured: float
    low: float
    high: float

    @classmethod
    def of(cls, what: str, limit: float, ratio: Samples) -> "Limit":
        """From a ratio's samples."""
        return cls(what, limit, ratio.median, ratio.quantile(0.2), ratio.quantile(0.8))

    def line(self) -> str:
        """A row of Markdown."""
        met = "yes" if self.measured <= self.limit else "no"
        spread = f" ({self.low:.3f}..{self.high:.3f})" if self.low != self.high else ""
        return f"| {self.what} | {self.limit:.2f} | {self.measured:.3f}{spread} | {met} |"


def row(
    op: str,
    direction: str,
    case: str,
    variant: str,
    samples: Samples,
    *,
    num_bytes: int | None = None,
    flops: int | None = None,
    ceiling: Ceiling | None = None,
) -> Row:
    """A row from its samples."""
    percent = None
    if ceiling is not None:
        work = flops if ceiling.counts == "flops" else num_bytes
        percent = None if work is None else 100.0 * work / samples.median / ceiling.rate
    return Row(
        op,
        direction,
        case,
        variant,
        samples.median * 1e6,
        samples.quantile(0.2) * 1e6,
        samples.quantile(0.8) * 1e6,
        len(samples.seconds),
        num_bytes,
        flops,
        None if ceiling is None else ceiling.name,
        percent,
    )


def machine_name(device: torch.device) -> str:
    """Short name of the GPU or the CPU, fit for a folder: "nvidia-h200", "amd-epyc-9b45"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        name = found[1] if found else platform.machine()
    name = re.sub(r"\(r\)|\(tm\)|@.*|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def environment(device: torch.device) -> dict[str, str]:
    """Machine, versions, commit and command of this run."""
    from vmoe_kernels.common.impl import HAS_TRITON

    made = {"machine": machine_name(device), "python": platform.python_version(), "torch": torch.__version__}
    if HAS_TRITON:
        import triton

        made["triton"] = triton.__version__
    if device.type == "cuda":
        made["cuda"] = str(torch.version.cuda)
    else:
        made["threads"] = str(torch.get_num_threads())
    made["commit"] = _commit()
    made["command"] = _command()
    return made


def _command() -> str:
    """What was typed: a module started with -m sees its file as the first argument."""
    spec = sys.modules["__main__"].__spec__
    started = ["python", Path(sys.argv[0]).name] if spec is None else ["python -m", spec.name.removesuffix(".__main__")]
    return " ".join([*started, *sys.argv[1:]])


@functools.cache
def _commit() -> str:
    """The commit that is checked out, and whether files differ from it; GIT_COMMIT where there is no repository."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
    return commit.strip() + (" with changes" if changes.strip() else "")


def limit_table(limits: list[dict]) -> list[str]:
    """Markdown lines, one per limit as JSON holds it."""
    return ["| what | limit | measured | met |", "| --- | --- | --- | --- |", *(Limit(**one).line() for one in limits)]


def table(rows: list[dict]) -> list[str]:
    """Markdown lines, one per row as JSON holds it."""
    lines = [
        "| op | direction | case | variant | median us | 20%..80% us | rate | % of |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in from_dicts(rows):
        percent = "" if each.percent is None else f"{each.percent:.0f}% of {each.ceiling}"
        lines.append(
            f"| {each.op} | {each.direction} | {each.case} | {each.variant} | {each.median_us:.1f} "
            f"| {each.low_us:.1f}..{each.high_us:.1f} | {each.rate} | {percent} |"
        )
    return lines


def heading(title: str, made: dict[str, str]) -> list[str]:
    """Markdown lines that say where the numbers come from."""
    return [f"# {title}", "", ", ".join(f"{name} {value}" for name, value in made.items()) + ".", ""]


def report_heading(title: str, content: dict) -> list[str]:
    """The same of a report, and whether it is a part."""
    part = [] if content["complete"] else ["The run has not ended: this is a part.", ""]
    return heading(title, content["environment"]) + part


def write(folder: Path, name: str, content: dict, markdown: list[str]) -> Path:
    """Writes <name>.json and <name>.md whole or not at all; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(content, indent=1)), (".md", "\n".join(markdown))):
        partial = folder / f".{name}{suffix}"
        partial.write_text(text + "\n")
        partial.replace(folder / f"{name}{suffix}")
    return folder / f"{name}.md"


def publish(folder: Path, name: str, content: dict, markdown: Callable[[dict], list[str]]) -> Path:
    """Writes both files, the Markdown from what the JSON holds, and prints it; returns its path."""
    path = write(folder, name, content, markdown(content))
    print(path.read_text(), end="")
    print(f"written to {path}", file=sys.stderr)
    return path


def command_line(doc: str, out: Path = RESULTS, threads: int | None = None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring.

    Args:
        doc: the docstring.
        out: default of `--out`, the folder of the results.
        threads: default of `--threads`; None for a benchmark without this option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder of the results (%(default)s)")
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads, help="of torch (%(default)s)")
    return parser


def as_dicts(rows: list[Row]) -> list[dict]:
    """Rows as JSON takes them."""
    return [{**dataclasses.asdict(each), "rate": each.rate} for each in rows]


def from_dicts(rows: list[dict]) -> list[Row]:
    """Rows as `as_dicts` gave them."""
    names = {each.name for each in dataclasses.fields(Row)}
    return [Row(**{name: value for name, value in each.items() if name in names}) for each in rows]
