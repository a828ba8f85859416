"""Checks of numbers, one for each kind: what is refused is named, with the rule and what was got.

Integers and numbers may be Python's or numpy's; True and False are neither. Inside a compiler a size may be symbolic:
bounds that it would have to prove are left to the ops, which check the real sizes.
"""

import math
import numbers

import torch
from torch import Tensor

# Slots are int32, and so are the choices that hold them.
MAX_ROWS = 2**31
# What the Triton kernels of routing hold in registers.
MAX_EXPERTS, MAX_SELECTED = 256, 8
# Philox counts in 32 bits: beyond, the random numbers would repeat.
MAX_DRAWS = 2**32


def check_integer(name: str, value: int, least: int, rule: str = "", most: int | None = None) -> int:
    """The value as an int, or a symbolic one as it is.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest that is allowed.
        rule: the bounds in words; by default "at least <least>".
        most: the largest that is allowed.

    Raises:
        ValueError: if the value is no integer or out of bounds.
    """
    rule = rule or f"at least {least}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise ValueError(f"{name} must be {rule}, got {value!r} (not an integer)")
    if not isinstance(value, (int, torch.SymInt)):
        value = int(value)
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {rule}, got {value}")
    return value


def check_selected(num_selected_experts: int, num_experts: int) -> int:
    """K is in 1..E."""
    rule = f"in 1..num_experts={num_experts}"
    return check_integer("num_selected_experts", num_selected_experts, 1, rule, num_experts)


def check_number(name: str, value: float, rule: str, least: float = -math.inf, below: float = math.inf) -> float:
    """The value as a float, finite and in [least, below).

    Args:
        name: of the argument.
        value: what was given.
        rule: the bounds in words.
        least: the smallest that is allowed.
        below: what it must be below.

    Raises:
        ValueError: if the value is no number, not finite or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, numbers.Real)):
        raise ValueError(f"{name} must be {rule}, got {value!r} (not a number)")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be {rule}, got {value} (not finite)")
    if not least <= value < below:
        raise ValueError(f"{name} must be {rule}, got {value}")
    return value if type(value) in (float, torch.SymFloat) else float(value)


def check_flag(name: str, value: bool) -> bool:
    """The value, which must be True or False (or numpy's)."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_seed(seed: Tensor, device: torch.device, needed_for: str) -> None:
    """A Philox key is a 0-dim int64 tensor on the device of the data."""
    rule = f"seed must be a 0-dim int64 tensor when {needed_for}"
    if not isinstance(seed, Tensor):
        raise ValueError(f"{rule}, got {seed!r}")
    if seed.ndim != 0 or seed.dtype != torch.int64:
        raise ValueError(f"{rule}, got {tuple(seed.shape)} {seed.dtype}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device} like the data, got {seed.device}")


def check_triton_dtypes(**tensors: Tensor) -> None:
    """The Triton kernels accumulate in float32, so wider data would lose digits in silence."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{name} must be float16, bfloat16 or float32 for Triton kernels, got {tensor.dtype}")


def check_triton_routing(op: str, num_experts: int, num_choices: int, choices: str = "num_selected_experts") -> None:
    """E and K, which `choices` names, are within what the Triton kernels hold in registers."""
    for name, value, most in (("num_experts", num_experts, MAX_EXPERTS), (choices, num_choices, MAX_SELECTED)):
        check_integer(name, value, 0, f"at most {most} for the Triton {op}", most)


def check_rows(rows: int) -> None:
    """The rows of a buffer can be counted in int32."""
    if not torch.compiler.is_compiling() and rows >= MAX_ROWS:
        raise ValueError(f"the buffer must have fewer than 2**31 rows, got {rows}")


def check_choices(slots: Tensor) -> None:
    """The choices that rows hold can be counted in int32."""
    if not torch.compiler.is_compiling() and slots.numel() >= MAX_ROWS:
        raise ValueError(f"slots must hold fewer than 2**31 choices, got {slots.numel()}")


def check_draws(what: str, count: int) -> None:
    """So many random numbers can be counted in 32 bits."""
    if not torch.compiler.is_compiling() and count >= MAX_DRAWS:
        raise ValueError(f"{what} must be fewer than 2**32 to draw random numbers for, got {count}")
