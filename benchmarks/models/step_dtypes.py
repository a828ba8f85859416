"""A V-MoE's whole training step on a CPU in bfloat16, by autocast and with bfloat16 weights, against float32's."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.entries import Entry
from benchmarks.harness.pairs import PAIRS, Pair, make_models
from benchmarks.harness.protocol import measure, one_update, require_close
from benchmarks.harness.results import Row, row
from vmoe_torch import moe_layers

CPU = torch.device("cpu")
LIMIT = 1.0
FLOAT32, AUTOCAST, WEIGHTS = "float32", "bfloat16 autocast", "bfloat16 weights"
# As in the CPU's report, but fewer images: a step is to take a second or two.
PAIR = replace(PAIRS["cpu"], images=16)


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """A copy of the model for each way of training; autocast comes with `forward_of`."""
    return {
        FLOAT32: copy.deepcopy(model),
        AUTOCAST: copy.deepcopy(model),
        WEIGHTS: copy.deepcopy(model).to(torch.bfloat16),
    }


def forward_of(name: str, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Logits of a variant, as its user would write it."""
    if name == WEIGHTS:
        images = images.to(torch.bfloat16)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if name == AUTOCAST else nullcontext():
            return model(images)

    return call


@torch.no_grad()
def check(name: str, model: nn.Module, images: Tensor) -> None:
    """The logits are at most twice as far from float64 as with the eager reference, in the same precision.

    Raises:
        RuntimeError: if they are further off; nothing is timed then.
    """
    layers = moe_layers(model).values()
    got = forward_of(name, model, images)()
    for layer in layers:
        layer.impl = "reference"
    eager = forward_of(name, model, images)()
    exact = copy.deepcopy(model).double()(images.to(next(model.parameters()).dtype).double())
    for layer in layers:
        layer.impl = "auto"
    try:
        require_close({"logits": got}, {"logits": eager}, {"logits": exact})
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error


def training_step(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """By AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = forward_of(name, model, images)
    return one_update(lambda: F.cross_entropy(forward().float(), labels), optimizer)


def run(seconds: float, pair: Pair = PAIR) -> tuple[list[Entry], list[Row]]:
    """Checks, then times all steps in turn."""
    models, images = make_models(pair, CPU, torch.float32)
    labels = torch.arange(len(images))
    calls = {}
    for name, model in variants(models["ours"].train()).items():
        check(name, model, images[:8])
        calls[name] = training_step(name, model, images, labels)
    samples = measure(calls, CPU, seconds)
    case = f"{pair.moe} B={len(images)} {images.shape[-1]} px, AdamW"
    rows = [row("train_step", "both", case, name, each) for name, each in samples.items()]
    found = [
        Entry.of(f"training step, {name} over float32, {case}", LIMIT, samples[name].over(samples[FLOAT32]))
        for name in (AUTOCAST, WEIGHTS)
    ]
    return found, rows
