"""Launch choices as data: which block sizes, warps and stages a kernel runs with on which device and shape.

A Triton file registers one table per kernel and asks `look_up` at launch. Keys are (device kind, Triton version, shape
bucket), each a name or "any"; nothing is searched at run time, so every rank and every run makes the same choice.
`python -m benchmarks.compile.tune` searches on request and prints an entry to paste.
"""

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

ANY = "any"
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Config:
    """One launch choice: block sizes and variants (the kernel's constexprs), warps and pipeline stages."""

    constexprs: Mapping[str, Any]
    """Block sizes and variants, by the name of the constexpr."""
    num_warps: int
    """Warps of a program."""
    num_stages: int = 1
    """Stages of the pipeline."""
    max_registers: int | None = None
    """Per thread, so that more programs fit on a multiprocessor; None leaves it to the compiler."""

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `kernel[grid](...)`."""
        kwargs = {**self.constexprs, "num_warps": self.num_warps, "num_stages": self.num_stages}
        return kwargs if self.max_registers is None else {**kwargs, "maxnreg": self.max_registers}


_TABLES: dict[str, dict[Key, Config]] = {}
_CANDIDATES: dict[str, tuple[Config, ...]] = {}
_OVERRIDES: dict[str, Config] = {}
_RECORDINGS: list[list[tuple[str, str]]] = []
_PRETENDED: list[str] = []


def register_table(op: str, table: Mapping[Key, Config], candidates: Sequence[Config] = ()) -> None:
    """Gives a kernel its table.

    Args:
        op: name of the kernel, e.g. "dispatch_forward".
        table: (device kind, Triton version, shape bucket) to Config. Device kinds are as `device_kind` names them,
            versions are "3.6"; each may be "any". ("any", "any", "any") is required and must fit in 99 KB of shared
            memory, the least of the chips since sm_80.
        candidates: what `python -m benchmarks.compile.tune` tries beside the table's own entries.

    Raises:
        ValueError: if the fallback entry is missing.
    """
    if (ANY, ANY, ANY) not in table:
        raise ValueError(f"the launch table of {op!r} must have an entry ('any', 'any', 'any'), got {sorted(table)}")
    _TABLES[op] = dict(table)
    _CANDIDATES[op] = tuple(candidates)


def look_up(op: str, device: torch.device, bucket: str = ANY) -> Config:
    """The config of a launch: the most specific entry that matches, device before version before bucket.

    Under `torch.use_deterministic_algorithms(True)` the bucket and the version do not count: one config per device
    and kernel, so that a sum is taken in the same order whatever the size of the batch.

    Raises:
        ValueError: if no table of that name is registered.
    """
    if op not in _TABLES:
        raise ValueError(f"op must be one of {sorted(_TABLES)}, got {op!r}")
    for seen in _RECORDINGS:
        seen.append((op, bucket))
    if op in _OVERRIDES:
        return _OVERRIDES[op]
    table, kind = _TABLES[op], device_kind(device)
    fixed = torch.are_deterministic_algorithms_enabled()
    versions = (ANY,) if fixed else (triton_version(), ANY)
    buckets = (ANY,) if fixed else (bucket, ANY)
    for kind_key in (kind, ANY):
        for version in versions:
            for bucket_key in buckets:
                config = table.get((kind_key, version, bucket_key))
                if config is not None:
                    return config
    raise AssertionError("a registered table has a fallback entry")


def size_bucket(size: int, bounds: Sequence[int]) -> str:
    """Name of the bucket that holds a size: "le1024" for the first bound that is not below it, else "gt<last>"."""
    for bound in bounds:
        if size <= bound:
            return f"le{bound}"
    return f"gt{bounds[-1]}"


def device_kind(device: torch.device) -> str:
    """ "sm80", "sm90", "sm100" (all of compute capability 10) or the chip's own number; "any" off CUDA."""
    return _PRETENDED[-1] if _PRETENDED else _chip(device)


@functools.cache
def _chip(device: torch.device) -> str:
    if device.type != "cuda":
        return ANY
    return kind_of(torch.cuda.get_device_capability(device))


def kind_of(capability: tuple[int, int]) -> str:
    """The kind of a chip by its compute capability."""
    major, minor = capability
    return "sm100" if major == 10 else f"sm{major}{minor}"


@contextmanager
def pretend(kind: str) -> Iterator[None]:
    """Launches in the block are chosen as on a chip of this kind, wherever the tensors are."""
    _PRETENDED.append(kind)
    try:
        yield
    finally:
        _PRETENDED.pop()


@functools.cache
def triton_version() -> str:
    """Major and minor version of the installed Triton, e.g. "3.6"."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def registered_ops() -> tuple[str, ...]:
    """Names of all kernels that have a table; import the Triton files first."""
    return tuple(sorted(_TABLES))


def candidates(op: str) -> tuple[Config, ...]:
    """What a search may try: the table's entries for this Triton and the extra candidates, each once."""
    if op not in _TABLES:
        raise ValueError(f"op must be one of {sorted(_TABLES)}, got {op!r}")
    # An entry of this version stands in place of that of any.
    entries = {(kind, bucket): config for (kind, version, bucket), config in _TABLES[op].items() if version == ANY}
    for (kind, version, bucket), config in _TABLES[op].items():
        if version == triton_version():
            entries[kind, bucket] = config
    unique: list[Config] = []
    for config in (*entries.values(), *_CANDIDATES[op]):
        if config not in unique:
            unique.append(config)
    return tuple(unique)


@contextmanager
def override(op: str, config: Config) -> Iterator[None]:
    """Runs a block with one config, whatever the table says; for the search and for tests."""
    if op not in _TABLES:
        raise ValueError(f"op must be one of {sorted(_TABLES)}, got {op!r}")
    before = _OVERRIDES.get(op)
    _OVERRIDES[op] = config
    try:
        yield
    finally:
        if before is None:
            del _OVERRIDES[op]
        else:
            _OVERRIDES[op] = before


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Yields a list that fills with the (op, bucket) of every look-up in the block."""
    seen: list[tuple[str, str]] = []
    _RECORDINGS.append(seen)
    try:
        yield seen
    finally:
        _RECORDINGS.remove(seen)
