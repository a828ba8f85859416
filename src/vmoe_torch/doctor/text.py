"""What was found, as text for people."""

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

from vmoe_torch.doctor.examination import Examination
from vmoe_torch.doctor.ops import DTYPES, OPS

WIDTH = 110
IMPLS = {"triton": "the Triton kernels", "cpu": "our loops for a CPU", "reference": "plain PyTorch, the eager twins"}
ALLOWED = (
    "Allowed: twice the error of eager PyTorch in the same dtype, both measured against float64, and always a few "
    "units in the last place. Outputs and gradients count; slots must keep the twin's choices."
)
PRODUCTS = "Products: the experts' matrix products alone, by PyTorch's own library; no layer is faster."


def describe(found: Examination) -> str:
    """All of it; ends with what is not well and what to do."""
    parts = [
        f"vmoe doctor: vmoe-torch {found.versions['vmoe-torch']} on {found.device}",
        _section("Versions", _aligned((name, value or "none") for name, value in found.versions.items())),
        _section("Devices", [line for each in found.devices for line in _device(each)]),
        _section("Processes", _aligned(found.groups.items())),
        _section("Threads", [_threads(found.threads)]),
        _section('impl="auto"', _aligned(_choices(found))),
        _section(
            f"Ops on {found.device}: largest error in % of what is allowed", [*_checks(found), *_wrapped(ALLOWED)]
        ),
    ]
    if found.speeds:
        heading = f"Speed of a layer, routing included: milliseconds at {found.layer}"
        parts.append(_section(heading, [*_speeds(found), *_wrapped(PRODUCTS)]))
    if found.remarks:
        parts.append(_section("Remarks", [line for each in found.remarks for line in _wrapped(each, "- ")]))
    return "\n\n".join([*parts, _verdict(found)])


def _section(heading: str, lines: Iterable[str]) -> str:
    return "\n".join([heading, *(f"  {line}" for line in lines)])


def _wrapped(text: str, first: str = "") -> list[str]:
    return wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def _aligned(rows: Iterable[Sequence[Any]], right: bool = False) -> list[str]:
    """Columns of text, the first to the left, others to the left or to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        rest = (cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(others, widths[1:]))
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return lines


def _device(device: dict[str, Any]) -> list[str]:
    memory = f"{device['memory'] / 2**30:.1f} GiB"
    if device["device"] == "cpu":
        facts = [f"{device['cores']} cores for this process", memory, device["library"], *device["instructions"]]
    else:
        shared = device["shared_memory"]
        facts = [f"compute capability {device['capability']}", f"{device['multiprocessors']} multiprocessors", memory]
        facts.append(f"{shared:,} bytes of shared memory a block" if shared else "shared memory a block unknown")
    return _wrapped(f"{device['device']}: {device['name']}, {', '.join(facts)}")


def _threads(threads: dict[str, Any]) -> str:
    said = ", ".join(f"{name}={value}" for name, value in threads["environment"].items()) or "nothing set"
    return f"{threads['torch']} in an operator on {threads['cores']} cores; environment: {said}"


def _choices(found: Examination) -> list[tuple[str, str]]:
    """Dtypes that have the same one in a line."""
    lines: dict[str, list[str]] = {}
    for dtype, choice in found.auto.items():
        lines.setdefault(f"{IMPLS[choice.impl]}: {choice.reason}", []).append(dtype)
    return [(", ".join(dtypes), text) for text, dtypes in lines.items()]


def _checks(found: Examination) -> list[str]:
    cells = {(check.op, check.dtype): _cell(check.status, check.share) for check in found.checks}
    rows = [("", *DTYPES)]
    rows += [(op, *(cells.get((op, dtype), "not run") for dtype in DTYPES)) for op in OPS]
    return _aligned(rows, right=True)


def _cell(status: str, share: float | None) -> str:
    if status != "ok":
        return status.upper() if status == "fails" else status
    return "exact" if not share else f"{100 * share:.0f}"


def _speeds(found: Examination) -> list[str]:
    rows = [("", "ours", "eager", "products", "ours/products", "products TFLOP/s")]
    for one in found.speeds:
        times = [f"{1e3 * seconds:.2f}" for seconds in (one.ours, one.eager, one.products)]
        rate = f"{one.flops / one.products / 1e12:.3g}"
        rows.append((f"{one.dtype} {one.direction}", *times, f"{one.ours / one.products:.2f}", rate))
    return _aligned(rows, right=True)


def _verdict(found: Examination) -> str:
    done = sum(check.status != "not run" for check in found.checks)
    if not found.problems:
        return f"All is well: {done} checks of {len(OPS)} ops in {found.seconds:.0f} s."
    count = len(found.problems)
    lines = [f"{count} problem{'s' if count > 1 else ''}:"]
    for number, each in enumerate(found.problems, 1):
        lines += _wrapped(f"{each.what}: {each.why}", f"{number}. ")
        lines += _wrapped(f"what to do: {each.advice}", " " * len(f"{number}. "))
    return "\n".join(lines)
