"""Whether a card can launch the Triton kernels, and why not: found out before anything of ours is launched on it."""

import importlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from vmoe_kernels.common.launch import ANY, kind_of

# The oldest compute capability that Triton supports, as its README has it.
OLDEST = (8, 0)
# Bytes of shared memory that a block of our most demanding launch takes on each kind of chip. The numbers are those of
# benchmarks/results/compile_report, and a test holds them to it; a kind without launches of its own has those of "any".
SHARED_MEMORY = {ANY: 66_048, "sm90": 204_832, "sm100": 204_848}


def first_line(error: BaseException) -> str:
    """What an error says, in one line with its type."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _import_fault() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "Triton is not installed" if missing else f"Triton cannot be imported ({first_line(error)})"
    return None


# Why there is no Triton in this process, or None.
IMPORT_FAULT = _import_fault()


def c_compiler() -> str | None:
    """The C compiler that Triton takes, or None: it builds its launchers when they are needed."""
    if IMPORT_FAULT is None:
        build = getattr(importlib.import_module("triton").knobs, "build", None)
        if getattr(build, "impl", None) is not None:
            return "triton.knobs.build.impl"
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def python_headers() -> str | None:
    """The folder of Python.h, which launchers include, or None where it is missing."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that stays empty; Triton looks where everybody else's does.
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return folder if Path(folder, "Python.h").is_file() else None


def refusal(device: torch.device) -> str | None:
    """Why our Triton kernels cannot be launched on a CUDA device, in words; None if they can."""
    if IMPORT_FAULT is not None:
        return IMPORT_FAULT
    if torch.version.hip is not None:
        return "the kernels are written for CUDA, and this PyTorch is built for ROCm"
    if sys.platform != "linux":
        return f"Triton supports Linux, and this is {sys.platform}"
    if not torch.cuda.is_available():
        # A tensor without memory, as compilers trace with: there is no card to ask.
        return None
    card = torch.cuda.get_device_properties(device)
    capability = card.major, card.minor
    if capability < OLDEST:
        oldest, own = (".".join(map(str, each)) for each in (OLDEST, capability))
        return f"Triton needs compute capability {oldest}, and {card.name} has {own}"
    needed, has = shared_memory(capability), card.shared_memory_per_block_optin
    if has < needed:
        return f"the kernels need {needed:,} bytes of shared memory a block, and {card.name} has {has:,}"
    if c_compiler() is None:
        return (
            "Triton finds no C compiler, with which it builds its launchers: CC is not set, gcc and clang are missing"
        )
    return launch_fault(device)


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block of our kernels may take on a chip of this compute capability."""
    return SHARED_MEMORY.get(kind_of(capability), SHARED_MEMORY[ANY])


def launch_fault(device: torch.device) -> str | None:
    """What keeps a kernel that does nothing from running: a driver, a chip that this Triton does not know yet."""
    from vmoe_kernels.common.triton_nothing import nothing

    try:
        with torch.cuda.device(device):
            nothing[(1,)](2)
    except Exception as error:  # Whatever it is, no other kernel would fare better.
        headers = "" if python_headers() else "; Python.h is missing, which the package python3-dev or the like has"
        return f"Triton cannot launch a kernel that does nothing ({first_line(error)}){headers}"
    return None
