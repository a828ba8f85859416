"""One measuring session: what is checked, then timed, then written down at once."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from benchmarks.harness.cases import LAYERS, Case
from benchmarks.harness.protocol import Samples, measure, require_close, with_gradients
from benchmarks.harness.results import Ceiling, Row, as_dicts, environment, row
from benchmarks.harness.work import Work

# An op, as every variant of it is called: named tensors in, one tensor out.
Variant = Callable[..., Tensor]


def compiled(function: Callable) -> Callable:
    """torch.compile for one shape."""
    return torch.compile(function, dynamic=False)


@dataclass
class Session:
    """Where rows go, how much time is left, and which shapes are measured.

    A variant that fails or is wrong is noted and never timed; a wrong "ours" ends its comparison.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    cases: Sequence[Case] = LAYERS
    seconds: float = 600.0  # of the whole session
    seconds_per_variant: float = 0.25  # of timed runs
    compiler: Callable[[Callable], Callable] = compiled
    on_row: Callable[["Session"], None] = lambda session: None
    rows: list[Row] = field(default_factory=list)
    samples: dict[tuple[str, str, str, str], Samples] = field(default_factory=dict)
    sweeps: dict[str, dict[float, Samples]] = field(default_factory=dict)  # what varies, its values, their samples
    memory: dict[tuple[str, str], int] = field(default_factory=dict)  # (case, variant) to peak bytes of training
    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s, bytes/s or seconds, by name
    notes: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # names of files beside the report
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")  # of the op at hand, in seconds since the start

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def begin(self, what: str) -> bool:
        """Starts a case, unless the op at hand has used up its share of the time; says what is left out."""
        if self.elapsed > min(self.deadline, self.seconds):
            self.note(f"{what}: left out, no time was left")
            return False
        # Opponents are compiled for one shape, and a function keeps a bounded number of those.
        torch.compiler.reset()
        return True

    def run_all(self, shares: Sequence[tuple[str, float]]) -> None:
        """Runs modules of benchmarks in order, each until its share of the time is used up; what one leaves goes to the
        next.

        What fails, or wants a package that is not installed, is noted and costs the others nothing.
        """
        due = 0.0
        for name, share in shares:
            due += share * self.seconds
            self.deadline = due
            try:
                importlib.import_module(f"benchmarks.{name}").run(self)
            except Exception as error:  # Numbers that were measured must survive what comes after them.
                self.note(f"{name} stopped: {type(error).__name__}: {first_line(error)}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def content(self, bars: Sequence[dict], complete: bool) -> dict:
        """What the JSON of every report holds; `bars` are results of the bars."""
        return {
            "environment": environment(self.device),
            "complete": complete,
            "seconds": self.elapsed,
            "bars": bars,
            "pictures": self.pictures,
            "notes": self.notes,
            "rows": as_dicts(self.rows),
        }

    def trimmed(self, case: Case, variants: dict[str, Variant]) -> dict[str, Variant]:
        """Without torch.compile of the whole reference past the first two cases: compiling it takes longest."""
        if case not in self.cases[:2]:
            variants.pop("compile", None)
        return variants

    def note(self, text: str) -> None:
        """Writes down what a reader of the numbers must know."""
        self.notes.append(text)
        self.on_row(self)

    def compare(
        self,
        op: str,
        case: str,
        variants: Mapping[str, Variant],
        inputs: Mapping[str, Tensor],
        work: Mapping[str, Work],
        ceiling: Ceiling,
        *,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Checks every variant against the float64 reference, output and gradients, then times those that passed.

        Args:
            op: name in the rows.
            case: the shape, in words.
            variants: "ours", "eager" (the reference, which takes any dtype) and opponents.
            inputs: differentiable arguments by name.
            work: direction ("forward", "backward", "both") to what it must do at least.
            ceiling: what the rate is compared with.
            fixed: further arguments by name.
        """
        fixed = dict(fixed or {})
        # A compiled backward that is run again and again must not reuse the memory of what it reads.
        with functorch_config.patch(donated_buffer="backward" not in work):
            good = self.check(f"{op} {case}", variants, inputs, fixed)
            if "ours" not in good:
                return
            cotangent = self._cotangent(good["eager"], inputs, fixed)
            for direction, least in work.items():
                calls = {name: _call(each, inputs, fixed, direction, cotangent) for name, each in good.items()}
                self.time(op, direction, case, calls, least, ceiling)

    def check(
        self, what: str, variants: Mapping[str, Variant], inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
    ) -> dict[str, Variant]:
        """The variants whose output and gradients are as close to float64 as eager PyTorch's, within a factor of 2."""
        cotangent = self._cotangent(variants["eager"], inputs, fixed)
        exact_inputs = {name: tensor.double() for name, tensor in inputs.items()}
        exact_fixed = {name: _as_double(tensor) for name, tensor in fixed.items()}
        exact = _results(variants["eager"], exact_inputs, exact_fixed, cotangent.double())
        eager = _results(variants["eager"], inputs, fixed, cotangent)
        good = {}
        for name, variant in variants.items():
            try:
                require_close(_results(variant, inputs, fixed, cotangent), eager, exact)
            except Exception as error:  # An opponent may lack an operator, memory or precision: noted, left out.
                self.note(f"{what}: {name} is left out: {first_line(error)}")
            else:
                good[name] = variant
        return good

    def time(
        self,
        op: str,
        direction: str,
        case: str,
        calls: Mapping[str, Callable[[], object]],
        work: Work | None = None,
        ceiling: Ceiling | None = None,
    ) -> dict[str, Samples]:
        """Times calls in turn and adds a row for each."""
        samples = measure(calls, self.device, self.seconds_per_variant * len(calls))
        self.add(op, direction, case, samples, work, ceiling)
        return samples

    def add(
        self,
        op: str,
        direction: str,
        case: str,
        samples: Mapping[str, Samples],
        work: Work | None = None,
        ceiling: Ceiling | None = None,
    ) -> None:
        """Adds a row for each variant and has it written."""
        for name, each in samples.items():
            self.samples[op, direction, case, name] = each
            count = {} if work is None else {"num_bytes": work.bytes, "flops": work.flops or None}
            self.rows.append(row(op, direction, case, name, each, ceiling=ceiling, **count))
        self.on_row(self)

    def _cotangent(self, eager: Variant, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> Tensor:
        """A gradient of the output, the same for every variant."""
        with torch.no_grad():
            out = eager(**inputs, **fixed)
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(out.shape, generator=generator, device=self.device).to(out.dtype)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _results(
    variant: Variant, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor], cotangent: Tensor
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    return with_gradients(lambda: variant(**leaves, **fixed), leaves, cotangent)


def _call(
    variant: Variant,
    inputs: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    direction: str,
    cotangent: Tensor,
) -> Callable[[], object]:
    """A call without arguments that runs one direction of a variant."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    if direction == "both":
        return lambda: with_gradients(lambda: variant(**leaves, **fixed), leaves, cotangent)
    if direction == "backward":
        out = variant(**leaves, **fixed)
        return lambda: torch.autograd.grad(out, list(leaves.values()), cotangent, retain_graph=True)

    @torch.no_grad()
    def forward() -> Tensor:
        return variant(**inputs, **fixed)

    return forward
