"""What there is: versions, devices, ways for processes to talk to each other, threads."""

import os
import platform
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vmoe_torch
from vmoe_kernels.common.card import c_compiler, python_headers
from vmoe_torch import cores
from vmoe_torch.doctor.problems import Problem, of_error
from vmoe_torch.train.device import chosen_device
from vmoe_torch.train.record.logs import environment

# Seconds after which a process group of one counts as hanging.
PATIENCE = 30
# What a CPU has for products in 16 bits, as Linux calls it.
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)


def device_or_reason(name: str) -> torch.device:
    """The device of a name, as all commands take it.

    Raises:
        ValueError: if there is no such GPU, saying why.
    """
    try:
        return chosen_device("--device", name)
    except ValueError as error:
        if torch.cuda.is_available():
            raise
        raise ValueError(f"{error}: {_reason()}") from None


def _reason() -> str:
    """Why PyTorch sees no CUDA device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    driver = driver_version()
    return "no NVIDIA driver was found" if driver is None else f"the driver is {driver}"


def driver_version() -> str | None:
    """Of the NVIDIA driver, or None."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module\s+(\d[\d.]+)", file.read_text()) if file.is_file() else None
    return None if found is None else found[1]


def versions() -> dict[str, str | None]:
    """What is installed, and what Triton builds its launchers with; None where there is nothing."""
    made = environment()
    packages = {name: version for name, version in made["versions"].items() if name != "vmoe-torch"}
    packages["torch"] = torch.__version__
    return {
        "vmoe-torch": vmoe_torch.__version__,
        "commit": made["commit"],
        "python": made["python"],
        "platform": made["platform"],
        **packages,
        "cuda": torch.version.cuda,
        **({} if torch.version.hip is None else {"rocm": torch.version.hip}),
        "driver": driver_version(),
        "compiler": c_compiler(),
        "python headers": python_headers(),
    }


def devices() -> list[dict[str, Any]]:
    """The CPU, and every GPU that PyTorch sees."""
    found = [cpu()]
    if torch.cuda.is_available():
        found += [gpu(number) for number in range(torch.cuda.device_count())]
    return found


def cpu() -> dict[str, Any]:
    """The CPU."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", text)
    has = set(flags[1].split()) if flags else set()
    pages = [
        os.sysconf(key) if key in getattr(os, "sysconf_names", ()) else 0 for key in ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    ]
    return {
        "device": "cpu",
        "name": name[1] if name else platform.machine(),
        "cores": cores.available_cores(),
        "memory": pages[0] * pages[1],
        "instructions": [flag for flag in CPU_FLAGS if flag in has],
        "library": "MKL" if torch.backends.mkl.is_available() else "no MKL",
    }


def gpu(number: int) -> dict[str, Any]:
    """One GPU."""
    properties = torch.cuda.get_device_properties(number)
    return {
        "device": f"cuda:{number}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "shared_memory": getattr(properties, "shared_memory_per_block_optin", None),
        "memory": properties.total_memory,
    }


def threads() -> dict[str, Any]:
    """How a process here computes with several threads."""
    names = sorted((*cores.COUNTS, *cores.WAITING, "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"))
    return {
        "torch": torch.get_num_threads(),
        "between_operators": torch.get_num_interop_threads(),
        "cores": cores.available_cores(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def groups(device: torch.device) -> tuple[dict[str, str], list[Problem]]:
    """Whether a process group of one works: gloo, and NCCL on a GPU."""
    said, problems = {}, []
    for backend, available in (("gloo", "is_gloo_available"), ("nccl", "is_nccl_available")):
        where = device if backend == "nccl" else torch.device("cpu")
        if not dist.is_available() or not getattr(dist, available)():
            said[backend] = "not in this build of PyTorch"
        elif backend == "nccl" and device.type != "cuda":
            said[backend] = "not tried: it needs a GPU"
        elif dist.is_initialized():
            said[backend] = "not tried: this process is in a group already"
        else:
            try:
                _group_of_one(backend, where)
                said[backend] = "a group of one process works"
            except Exception as error:  # Whatever it is: the others are still examined.
                advice = "training in several processes will not work; " + (
                    "see that this machine's own host name resolves, or set GLOO_SOCKET_IFNAME=lo"
                    if backend == "gloo"
                    else "run again with NCCL_DEBUG=INFO, and update the driver"
                )
                problems.append(of_error(backend, error, advice))
                said[backend] = f"fails: {problems[-1].why}"
        if said[backend].startswith("not in") and (backend == "gloo" or device.type == "cuda"):
            said[backend] += f": no training in several processes on {where.type}"
    return said, problems


def _group_of_one(backend: str, device: torch.device) -> None:
    """Sums and exchanges a tensor; raises RuntimeError if what comes back is another one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, wait = dist.HashStore(), timedelta(seconds=PATIENCE)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=wait)
    try:
        sent = torch.arange(4.0, device=device)
        summed, exchanged, gathered = sent.clone(), torch.empty_like(sent), torch.empty_like(sent)
        dist.all_reduce(summed)
        dist.all_to_all_single(exchanged, sent)
        dist.all_gather([gathered], sent)
        for name, got in (("all_reduce", summed), ("all_to_all", exchanged), ("all_gather", gathered)):
            if not torch.equal(got, sent):
                raise RuntimeError(f"{name} must give {sent.tolist()}, got {got.tolist()}")
    finally:
        dist.destroy_process_group()
