"""All that is looked at, in order, and what it comes to."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from vmoe_kernels.common.impl import INTERPRET, Choice, choose
from vmoe_torch.doctor import machine, ops, speed
from vmoe_torch.doctor.ops import DTYPES, Check
from vmoe_torch.doctor.problems import REFERENCE, Problem, of_error
from vmoe_torch.doctor.speed import Speed

# How much slower than eager PyTorch the layer may look before it is remarked on.
SLOWER = 1.1
# How much slower than float32's a dtype's products may be before it is advised against.
FAR_SLOWER = 2.0
Progress = Callable[[str], Callable[[Iterable], Iterable]]


@dataclass
class Examination:
    """What was found, as far as it goes; `doing` is what a process that dies was at."""

    device: str
    """That was examined."""
    complete: bool = False
    """Whether nothing is left to do."""
    doing: str = ""
    """What is being looked at."""
    seconds: float = 0.0
    """That it took."""
    versions: dict[str, str | None] = field(default_factory=dict)
    """What is installed."""
    devices: list[dict[str, Any]] = field(default_factory=list)
    """The CPU and the GPUs."""
    groups: dict[str, str] = field(default_factory=dict)
    """What came of a process group of one, by backend."""
    threads: dict[str, Any] = field(default_factory=dict)
    """How many, and what the environment says of them."""
    auto: dict[str, Choice] = field(default_factory=dict)
    """What impl="auto" is on the device, by dtype."""
    checks: list[Check] = field(default_factory=list)
    """The ops."""
    layer: str = ""
    """Sizes of the layer whose speed is measured."""
    speeds: list[Speed] = field(default_factory=list)
    """Of the layer."""
    problems: list[Problem] = field(default_factory=list)
    """What is not well."""
    remarks: list[str] = field(default_factory=list)
    """What a reader should know."""

    @property
    def healthy(self) -> bool:
        """Whether all was looked at and all is well."""
        return self.complete and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite number is null."""
        return {"healthy": self.healthy, **_plain(self)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def examine(
    device: torch.device,
    seconds: float,
    progress: Progress = lambda text: iter,
    on_step: Callable[[Examination], None] = lambda examination: None,
) -> Examination:
    """Looks at everything.

    Args:
        device: to examine.
        seconds: for measuring speed; 0 measures none.
        progress: from a text to what wraps a list of things to do.
        on_step: called with what there is before and after every step.

    Returns:
        Examination.
    """
    start = time.monotonic()
    found = Examination(str(device), threads=machine.threads(), versions=machine.versions(), devices=machine.devices())

    def begin(what: str) -> None:
        found.doing, found.seconds = what, time.monotonic() - start
        on_step(found)

    begin("process groups")
    found.groups, problems = machine.groups(device)
    found.problems += problems
    begin("the choice of an implementation")
    found.auto = {name: choose(device, dtype) for name, dtype in DTYPES.items()}
    judge_choice(found)
    for check in ops.check_all(device, ops.SIZES[device.type], progress("ops"), begin):
        found.checks.append(check)
        if check.problem is not None:
            found.problems.append(check.problem)
    if seconds > 0:
        wrong = tuple({check.dtype for check in found.checks if check.status != "ok"})
        found.layer = str(speed.SIZES[device.type])
        begin("speed")
        try:
            for one in speed.measure_all(device, seconds, wrong, progress("speed")):
                found.speeds.append(one)
                begin("speed")
        except Exception as error:  # The ops were right one by one: what the layer does is to be told, not lost.
            found.problems.append(of_error("a whole layer", error, REFERENCE))
    _remark(found, device)
    found.complete = True
    begin("")
    return found


def judge_choice(found: Examination) -> None:
    """A GPU that does not run the kernels is not well, though what it computes is right."""
    choice = found.auto["bfloat16"]
    if found.device.startswith("cuda") and choice.impl == "reference":
        advice = (
            "plain PyTorch computes the same meanwhile, slower; install or update what the reason names, or set "
            'impl="reference" where nothing can be done, which ends the warning'
        )
        found.problems.append(Problem(f'impl="auto" on {found.device}', choice.reason, advice))


def _remark(found: Examination, device: torch.device) -> None:
    for one in found.speeds:
        if one.ours > SLOWER * one.eager:
            found.remarks.append(
                f"{one.dtype} {one.direction}: {one.ours / one.eager:.1f} times as long as eager PyTorch"
            )
    full = {one.direction: one.products for one in found.speeds if one.dtype == "float32"}
    for one in found.speeds:
        factor = one.products / full.get(one.direction, math.inf)
        if factor > FAR_SLOWER:
            found.remarks.append(
                f"{one.dtype} {one.direction}: PyTorch's own products take {factor:.0f} times as long as in float32 on "
                f"this device; another dtype serves better"
            )
    cores = found.threads["cores"]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if found.speeds and load > cores + 0.5:
        found.remarks.append(f"other jobs run here (load {load:.1f} on {cores} cores): the times above mean little")
    driver, cuda = found.versions["driver"], found.versions["cuda"]
    if driver is not None and not torch.cuda.is_available():
        built = "without CUDA" if cuda is None else f"for CUDA {cuda}"
        found.remarks.append(f"there is an NVIDIA driver ({driver}), but PyTorch, built {built}, sees no GPU")
    if INTERPRET:
        found.remarks.append("TRITON_INTERPRET=1 is set: kernels are interpreted, which is for tests")
