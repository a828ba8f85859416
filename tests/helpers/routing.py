"""Checks of the router's and the slots' kernels, the same under the interpreter and on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

import vmoe_kernels as vk
from vmoe_kernels.common.groups import choices_of_rows
from vmoe_kernels.testing import poisoned_memory, slots_fault

# tokens, group size, width, experts, selected
ROUTER_SIZES = [
    (1, 1, 1, 1, 1),
    (13, 13, 48, 5, 3),
    (13, 4, 50, 8, 8),
    (150, 67, 48, 32, 2),
    (197, 197, 20, 40, 3),
    (33, 16, 24, 256, 8),
    (9, 9, 768, 32, 2),
]
COTANGENTS = ("gates", "logits", "importance", "load", "mean_gates")


def router_inputs(size: tuple[int, int, int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, device: str):
    """x (T, D) and a router weight (E, D) of logits with standard deviation 1."""
    tokens, _, width, experts, _ = size
    make = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, width, generator=make).to(device, dtype)
    weight = torch.randn(experts, width, generator=make) * width**-0.5
    return x, weight.to(device, weight_dtype)


def run_router(router: Callable, x: Tensor, weight: Tensor, size, noise_std: float, names=COTANGENTS) -> dict:
    """All outputs by name, and d_x and d_weight of the outputs in `names` with fixed random cotangents."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    seed = torch.tensor(2**41 + 77, device=x.device) if noise_std else None
    out = router(x, weight, num_selected_experts=size[4], group_size=size[1], noise_std=noise_std, seed=seed)
    make = torch.Generator().manual_seed(5)
    cotangents = {name: torch.randn(getattr(out, name).shape, generator=make).to(x.device) for name in COTANGENTS}
    loss = sum((getattr(out, name) * cotangents[name]).sum() for name in names if name != "load" or noise_std)
    d_x, d_weight = torch.autograd.grad(loss, (x, weight))
    return {name: value.detach() for name, value in out._asdict().items()} | {"d_x": d_x, "d_weight": d_weight}


def eager_router(x: Tensor, weight: Tensor, **options) -> vk.RouterOutput:
    """What plain PyTorch does with 16-bit tokens: logits by a linear layer in their dtype."""
    rounded = (x @ weight.to(x.dtype).t()).float()
    return vk.router_reference(rounded, torch.eye(weight.shape[0], device=x.device), **options)


def check_router(
    size, dtype: torch.dtype, weight_dtype: torch.dtype, noise_std: float, device: str, eager=None
) -> None:
    """Every output and gradient is at most twice as far from float64 as the eager router is."""
    x, weight = router_inputs(size, dtype, weight_dtype, device)
    for names in (COTANGENTS, ("gates",)):
        got = run_router(lambda *a, **k: vk.router(*a, impl="triton", **k), x, weight, size, noise_std, names)
        base = run_router(eager or vk.router_reference, x, weight, size, noise_std, names)
        exact = run_router(vk.router_reference, x.double(), weight.double(), size, noise_std, names)
        assert torch.equal(got.pop("experts"), exact.pop("experts"))
        for name, want in exact.items():
            assert got[name].dtype == (base[name].dtype if name.startswith("d_") else torch.float32), name
            error, eager_error = ((t[name].double() - want).abs().max().item() for t in (got, base))
            # A few units in the last place; Box and Muller's float32 functions add as many where there is noise.
            floor = torch.finfo(got[name].dtype).eps * max(want.abs().max().item(), 1.0 if noise_std else 0.0)
            assert error <= 2 * eager_error + (16 if noise_std else 4) * floor, (name, error, eager_error)


def make_choices(kind: str, tokens: int, num_experts: int, selected: int, device: str) -> tuple[Tensor, Tensor]:
    """Experts (T, K) int32 and gates (T, K) float32: random, "ties" (four gate values), "zeros" (0 and -0),
    "one_expert" (every first choice expert 0), "nan" (NaN and infinite gates) or "negative" gates.
    """
    make = torch.Generator().manual_seed(tokens + num_experts)
    logits = torch.randn(tokens, num_experts, generator=make)
    if kind == "one_expert":
        logits[:, 0] += 30.0
    gates, experts = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    gates, experts = gates[:, :selected].contiguous(), experts[:, :selected].to(torch.int32).contiguous()
    draw = torch.randint(0, 4, gates.shape, generator=make)
    # Multiples of 1/4: their sums are exact in any order.
    if kind == "ties":
        gates = draw / 4.0
    elif kind == "zeros":
        gates = torch.where(draw < 2, 0.0, -0.0)
    elif kind == "nan":
        gates = torch.tensor([torch.nan, 0.5, torch.inf, -torch.inf])[draw]
    elif kind == "negative":
        gates = draw * -0.25
    return experts.to(device), gates.to(device)


def check_slots(experts: Tensor, gates: Tensor, assign: Callable, **options) -> Tensor:
    """The kept choices are the twin's, and each holds a row of its own, within its expert, group and capacity."""
    slots = assign(experts, gates, **options)
    want = vk.assign_slots_reference(experts, gates, **options)
    fault = slots_fault(slots, want, **{name: options[name] for name in ("group_size", "capacity", "last_capacity")})
    assert fault is None, fault
    return slots


def check_rows(experts: Tensor, gates: Tensor, **options) -> None:
    """With the slots comes the choice that every row of the buffer holds, or -1 in an empty one."""
    with poisoned_memory():
        slots, choices = vk.assign_rows(experts, gates, impl="triton", **options)
        assert torch.equal(slots, vk.assign_slots(experts, gates, impl="triton", **options))
    assert choices.dtype == torch.int32
    assert torch.equal(choices, choices_of_rows(slots.unsqueeze(0), len(choices)).squeeze(0))
