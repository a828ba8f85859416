"""What the ops launch, recorded instead of run: real calls on CPU tensors, as on a chip that need not be there.

A public op is called, its CUDA implementation answers, and a recorder stands where Triton would compile and launch. It
keeps what Triton itself makes of the arguments: their types, which are multiples of 16, which are constants. Nothing is
computed and no tensor is filled, so sizes matter only where they choose a config or a constant.

Dims: T tokens, D width, H hidden width, E experts, K selected, S tokens per group, R rows per expert.
"""

import dataclasses
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import vmoe_kernels as kernels
from vmoe_kernels.common import launch
from vmoe_kernels.experts.triton_gemm import CUBLAS, LINEAR_OPS
from vmoe_kernels.experts.triton_gradient import WEIGHT_OPS
from vmoe_kernels.testing import products_of_float32

CAPABILITIES = (80, 90, 100)
# Chips that take what sm_80 takes, but for tables with entries of its own.
SIBLINGS = (86, 89, 120)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_CPU, _CUDA = torch.device("cpu"), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass(frozen=True)
class Launch:
    """A launch as Triton specialises it; names and plain values, so that other processes can compile it."""

    name: str
    """The launch table's name, or the kernel's where it has none, and what distinguishes the call."""
    kernel: str
    """Where the `@triton.jit` function stands: "module:name"."""
    signature: Mapping[str, str]
    """Run-time argument to its type: "*bf16", "i32", "tensordesc<bf16[1,128,64]>"."""
    constexprs: Mapping[str, Any]
    """Every constant argument, and None for absent optional pointers."""
    divisible: tuple[str, ...]
    """Pointers and integers that are multiples of 16."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Pipeline stages."""
    max_registers: int | None
    """Registers a thread may use at most, or None."""
    has_dot: bool
    """Whether the kernel multiplies matrices, so that it must use tensor cores."""
    grid: tuple[int, ...]
    """Programs along each axis."""

    @property
    def module(self) -> str:
        """Of the kernel."""
        return self.kernel.partition(":")[0]

    @property
    def function(self) -> JITFunction:
        """The kernel itself."""
        return pkgutil.resolve_name(self.kernel)

    @property
    def content(self) -> str:
        """What is compiled: all but the name and the grid."""
        return repr(dataclasses.replace(self, name="", grid=()))


def _multiplies(kernel: JITFunction, seen: set[str]) -> bool:
    """Whether the source of a kernel, or of a function it calls, has a `tl.dot`."""
    seen.add(kernel.__name__)
    names = set(kernel.fn.__code__.co_names) - seen
    called = (kernel.fn.__globals__.get(name) for name in names)
    return "tl.dot(" in kernel.src or any(_multiplies(each, seen) for each in called if isinstance(each, JITFunction))


class AsOnCuda(TorchDispatchMode):
    """Our ops' CUDA implementations answer, whatever the device of the tensors; one without any stays on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vmoe" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA"):
            return func.redispatch(_CUDA, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class NoProducts(TorchDispatchMode):
    """The library's products give memory that nobody fills: on a CPU they would be nearly all of a recording's time."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            return args[0].new_empty(*args[0].shape[:2], args[1].shape[2])
        return kwargs["out"] if func is torch.ops.aten.bmm.out else func(*args, **(kwargs or {}))


@contextmanager
def record(capability: int) -> Iterator[list[Launch]]:
    """Yields a list that fills with the launches of the block, which are not run.

    Args:
        capability: of the chip that launch tables are asked for: 80, 90, 100.
    """
    backend = make_backend(GPUTarget("cuda", capability, 32))
    launches: list[Launch] = []

    def keep(kernel: JITFunction, *args, grid: tuple[int, ...], warmup: bool, **kwargs) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*args, **kwargs)
        options = backend.parse_options(rest)
        types = {name: each[0] for name, each in zip(bound, specialization)}
        divisible = [name for name, each in zip(bound, specialization) if types[name] != "constexpr" and each[1] == "D"]
        launches.append(
            Launch(
                name=_table(looked_up, kwargs) or kernel.__name__.strip("_").removesuffix("_kernel"),
                kernel=f"{kernel.__module__}:{kernel.__name__}",
                signature={name: kind for name, kind in types.items() if kind != "constexpr"},
                constexprs={name: bound[name] for name, kind in types.items() if kind == "constexpr"},
                divisible=tuple(divisible),
                num_warps=options.num_warps,
                num_stages=options.num_stages,
                max_registers=options.maxnreg,
                has_dot=_multiplies(kernel, set()),
                grid=tuple(grid),
            )
        )

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", keep))
        stack.enter_context(patch.object(torch.cuda, "device", nullcontext))
        stack.enter_context(launch.pretend(f"sm{capability}"))
        looked_up = stack.enter_context(launch.recording())
        stack.enter_context(NoProducts())
        stack.enter_context(AsOnCuda())
        yield launches


def _table(looked_up: list[tuple[str, str]], kwargs: Mapping[str, Any]) -> str | None:
    """The table that was asked last of those whose config a launch carries."""
    for op, bucket in reversed(list(looked_up)):
        if launch.look_up(op, _CPU, bucket).kwargs().items() <= kwargs.items():
            return op
    return None


def _leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _seed() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])


def _route(x: torch.dtype, weight: torch.dtype, width: int, num_experts: int, selected: int, noise: bool) -> None:
    """With noise, the losses have gradients too."""
    inputs = _leaf(x, 128, width), _leaf(weight, num_experts, width)
    noisy = {"noise_std": 1.0, "seed": _seed()} if noise else {}
    out = kernels.router(*inputs, num_selected_experts=selected, **noisy)
    _backward(out.gates, *((out.importance, out.load, out.mean_gates) if noise else ()))


def _assign(
    group: int,
    num_experts: int,
    selected: int,
    batch_priority: bool,
    priority: str = "max",
    assign: Callable = kernels.assign_slots,
) -> None:
    choices = torch.empty(group, selected, dtype=torch.int32)
    settings = {"num_experts": num_experts, "capacity": 1, "batch_priority": batch_priority, "priority": priority}
    assign(choices, torch.empty(group, selected), group_size=group, **settings)


def _move(dtype: torch.dtype, width: int, selected: int) -> None:
    """Dispatch and combine."""
    slots, gates = torch.empty(64, selected, dtype=torch.int32), _leaf(FP32, 64, selected)
    _backward(kernels.dispatch(_leaf(dtype, 64, width), slots, 64))
    _backward(kernels.combine(_leaf(dtype, 64, width), slots, gates))


def _experts(
    routed: bool,
    dtype: torch.dtype,
    activation: str,
    width: int,
    hidden: int,
    *,
    rows: int = 128,
    biased: bool = True,
    drop: float = 0.0,
    train: bool = True,
    tf32: bool = False,
) -> None:
    """A step of `moe_mlp`, or of `expert_mlp` where rows are not routed; without `train` the forward alone.

    With `tf32` PyTorch is told to multiply float32 so.
    """
    leaf = partial(_leaf, dtype)
    weights = {"fc1_weight": leaf(2, hidden, width), "fc2_weight": leaf(2, width, hidden)}
    weights |= {"fc1_bias": leaf(2, hidden) if biased else None, "fc2_bias": leaf(2, width) if biased else None}
    settings = {"activation": activation, "drop": drop, "seed": _seed() if drop else None}
    with torch.set_grad_enabled(train), products_of_float32("tf32" if tf32 else "ieee"):
        if routed:
            slots, gates = torch.empty(128, 2, dtype=torch.int32), _leaf(FP32, 128, 2)
            out = kernels.moe_mlp(leaf(128, width), slots, gates, **weights, rows_per_expert=rows, **settings)
        else:
            out = kernels.expert_mlp(leaf(2, rows, width), **weights, **settings)
        if train:
            _backward(out)


def _dropless(dtype: torch.dtype, activation: str, tokens: int = 1024, drop: float = 0.0) -> None:
    """A step of dropless slots and experts."""
    leaf = partial(_leaf, dtype)
    slots, spans = kernels.assign_dropless_slots(torch.empty(tokens, 2, dtype=torch.int32), num_experts=2)
    weights = leaf(2, 3072, 768), leaf(2, 3072), leaf(2, 768, 3072), leaf(2, 768)
    settings = {"activation": activation, "drop": drop, "seed": _seed() if drop else None}
    _backward(kernels.dropless_mlp(leaf(tokens, 768), slots, spans, _leaf(FP32, tokens, 2), *weights, **settings))


HEADLINE = "routed/bf16/gelu_tanh/768x3072"
# Widths of V-MoE-B and, the larger ones, V-MoE-H; 48 takes the tall tiles.
CALLS: dict[str, Callable[[], None]] = {
    "bf16xbf16/D768/E32/K2": partial(_route, BF16, BF16, 768, 32, 2, False),
    "bf16xfp32/D768/E32/K2/noise": partial(_route, BF16, FP32, 768, 32, 2, True),
    "bf16xfp32/D768/E8/K1/noise": partial(_route, BF16, FP32, 768, 8, 1, True),
    "bf16xfp16/D768/E32/K2": partial(_route, BF16, FP16, 768, 32, 2, False),
    "fp16xfp32/D768/E32/K2/noise": partial(_route, FP16, FP32, 768, 32, 2, True),
    **{f"bf16xfp32/D1280/E{e}/K2/noise": partial(_route, BF16, FP32, 1280, e, 2, True) for e in (64, 128, 256)},
    **{f"fp32xfp32/D768/E{e}/K2/noise": partial(_route, FP32, FP32, 768, e, 2, True) for e in (32, 64, 128, 256)},
    **{
        f"slots/bpr/S{group}/K{selected}": partial(_assign, group, 32, selected, True, "sum")
        for group, selected in ((256, 2), (2048, 1), (2048, 2), (2048, 8), (4096, 2))
    },
    **{
        f"slots/vanilla/S{group}/K{selected}": partial(_assign, group, 32, selected, False)
        for group, selected in ((256, 2), (2048, 1), (2048, 2), (2048, 8), (4096, 2))
    },
    **{
        f"rows/{order}/S{group}/K{selected}": partial(
            _assign, group, 32, selected, order == "bpr", "sum", assign=kernels.assign_rows
        )
        for order in ("bpr", "vanilla")
        for group, selected in ((256, 2), (2048, 2), (2048, 8), (4096, 2))
    },
    "slots/bpr/max/S2048/K2": partial(_assign, 2048, 32, 2, True),
    # Groups that only sorting takes.
    "slots/vanilla/E32/K2": partial(_assign, 5000, 32, 2, False),
    "slots/bpr/E32/K2": partial(_assign, 5000, 32, 2, True, "sum"),
    "slots/bpr/max/E32/K2": partial(_assign, 5000, 32, 2, True),
    "slots/bpr/E256/K8": partial(_assign, 5000, 256, 8, True, "sum"),
    **{
        f"{name}/D{width}/K{selected}": partial(_move, dtype, width, selected)
        for name, dtype in (("bf16", BF16), ("fp32", FP32))
        for width, selected in ((768, 1), (768, 2), (1280, 2), (48, 2))
    },
    "fp16/D768/K2": partial(_move, FP16, 768, 2),
    HEADLINE: partial(_experts, True, BF16, "gelu_tanh", 768, 3072),
    "routed/bf16/gelu/1280x5120": partial(_experts, True, BF16, "gelu", 1280, 5120),
    "routed/fp16/gelu/768x3072": partial(_experts, True, FP16, "gelu", 768, 3072),
    "routed/fp32/gelu/768x3072": partial(_experts, True, FP32, "gelu", 768, 3072),
    "routed/bf16/gelu_tanh/768x3072/le64": partial(_experts, True, BF16, "gelu_tanh", 768, 3072, rows=64),
    # More rows than choices to fill them.
    "routed/bf16/gelu_tanh/768x3072/roomy": partial(_experts, True, BF16, "gelu_tanh", 768, 3072, rows=256),
    "routed/bf16/gelu_tanh/768x3072/unbiased": partial(_experts, True, BF16, "gelu_tanh", 768, 3072, biased=False),
    "routed/bf16/gelu_tanh/768x3072/inference": partial(_experts, True, BF16, "gelu_tanh", 768, 3072, train=False),
    "routed/bf16/gelu_tanh/768x3072/dropout": partial(_experts, True, BF16, "gelu_tanh", 768, 3072, drop=0.1),
    "routed/tf32/gelu/768x3072": partial(_experts, True, FP32, "gelu", 768, 3072, tf32=True),
    "routed/tf32/gelu/768x3072/dropout": partial(_experts, True, FP32, "gelu", 768, 3072, drop=0.1, tf32=True),
    "routed/fp32/gelu/768x3072/dropout": partial(_experts, True, FP32, "gelu", 768, 3072, drop=0.1),
    "unrouted/bf16/gelu_tanh/768x3072": partial(_experts, False, BF16, "gelu_tanh", 768, 3072),
    "unrouted/fp32/gelu/768x3072": partial(_experts, False, FP32, "gelu", 768, 3072),
    "dropless/bf16/gelu_tanh/768x3072": partial(_dropless, BF16, "gelu_tanh"),
    "dropless/bf16/gelu_tanh/768x3072/le64": partial(_dropless, BF16, "gelu_tanh", tokens=64),
    "dropless/bf16/gelu_tanh/768x3072/roomy": partial(_dropless, BF16, "gelu_tanh", tokens=256),
    "dropless/bf16/gelu_tanh/768x3072/dropout": partial(_dropless, BF16, "gelu_tanh", drop=0.1),
    "dropless/fp32/gelu/768x3072": partial(_dropless, FP32, "gelu"),
}
# With cuBLAS for every GEMM, which leaves the epilogues to kernels of their own.
_BY_CUBLAS: dict[str, Callable[[], None]] = {
    "cublas/bf16/gelu_tanh/768x3072": CALLS[HEADLINE],
    "cublas/bf16/gelu/1280x5120/dropout": partial(_experts, True, BF16, "gelu", 1280, 5120, drop=0.1),
    "cublas/fp32/gelu/768x3072": partial(_experts, True, FP32, "gelu", 768, 3072),
}


def _tried(capability: int) -> Iterator[tuple[str, launch.Config]]:
    """The GEMMs' tables and configs that tuning tries: wide tiles by pointers are for sm_90, the others go on."""
    for op in (*LINEAR_OPS, "expert_d_hidden", *WEIGHT_OPS):
        for config in launch.candidates(op):
            lasting = config.constexprs.get("TMA") or "BLOCK_M" in config.constexprs
            if config != CUBLAS and (capability == 90 or (capability == 100 and lasting)):
                yield op, config


def _tile(config: launch.Config) -> str:
    """How a config is told from others: "128x256x64/persistent/tma"."""
    sizes = [str(size) for name, size in config.constexprs.items() if name.startswith("BLOCK_")]
    return "/".join(["x".join(sizes), *(name.lower() for name in ("PERSISTENT", "TMA") if config.constexprs.get(name))])


def capture(capability: int) -> list[Launch]:
    """Each launch that the calls make on a chip, and that tuning may make, once and under a name of its own."""
    found: dict[str, Launch] = {}
    names: set[str] = set()

    def add(call: str, configs: Mapping[str, launch.Config], run: Callable[[], None], only: str = "") -> None:
        with ExitStack() as stack:
            for op, config in configs.items():
                stack.enter_context(launch.override(op, config))
            with record(capability) as launches:
                run()
        for each in launches:
            if each.content not in found and only in ("", each.name):
                name = f"{each.name}/{call}"
                # A call may ask a table twice.
                numbered = chain([name], (f"{name}/{n}" for n in count(2)))
                name = next(option for option in numbered if option not in names)
                names.add(name)
                found[each.content] = dataclasses.replace(each, name=name)

    for call, run in CALLS.items():
        add(call, {}, run)
    by_library = {op: CUBLAS for op in launch.registered_ops() if CUBLAS in launch.candidates(op)}
    for call, run in _BY_CUBLAS.items():
        add(call, by_library, run)
    for op, config in _tried(capability):
        add(f"{HEADLINE}/{_tile(config)}", {op: config}, CALLS[HEADLINE], only=op)
    return list(found.values())
