"""What the last weights of a run are worth: which motions they tell apart, and with less and less capacity.

Dims: N clips of T frames of S x S pixels.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies.fashion_mnist import FORWARDS_PER_UPDATE
from benchmarks.studies.motion import runs
from benchmarks.studies.motion.clips import Clips
from benchmarks.studies.motion.draw import MOTIONS
from benchmarks.studies.motion.formula import Shape
from benchmarks.studies.motion.runs import FRAMES, TUBELET, FrameByFrame, Run, as_input, train, trained
from vmoe_torch.control import moe_layers, routing, set_routing
from vmoe_torch.evaluate import count_flops
from vmoe_torch.files import write_json

CAPACITY_FACTORS = (1.05, 0.75, 0.5, 0.35, 0.25)
RESULT = "result.json"
# Clips of a forward.
TOGETHER = 128


def execute(run: Run, folder: Path, deadline: float = math.inf) -> dict | None:
    """Trains, or goes on, and measures the last weights; what was found stays in the run's folder.

    Args:
        run: what to train.
        folder: of all runs; it holds the fonts as well.
        deadline: of time.monotonic(), to stop at with a checkpoint.

    Returns:
        What result.json holds; None if the training was stopped before its end.
    """
    file = folder / run.name / RESULT
    if file.exists():
        return json.loads(file.read_text())
    seconds = train(run, runs.clips_of(folder, "train"), folder, deadline)
    if seconds is None:
        return None
    model = trained(run, folder)
    if moe_layers(model):
        # By priority: vanilla serves the patches of the first frames first, so that a model of frames is not wholly
        # blind to their order.
        set_routing(model, batch_priority=True)
    test = whole(runs.clips_of(folder, "test"))
    frames = isinstance(model, FrameByFrame)
    flops, shape = flops_of(model), shape_of(run)
    found = {
        "name": run.name,
        "title": run.title,
        "clips": run.updates * runs.BATCH,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "formula_parameters": shape.parameters,
        "flops": flops,
        "formula_flops": shape.flops * (FRAMES if frames else 1),
        # It is trained on one frame of each tubelet.
        "training_flops": FORWARDS_PER_UPDATE * flops / (TUBELET if frames else 1) * run.updates * runs.BATCH,
        "training_seconds": seconds,
        "validation": accuracies(model, *whole(runs.clips_of(folder, "val"))),
        "test": accuracies(model, *test),
        "unseen": accuracies(model, *whole(runs.clips_of(folder, "test", runs.UNSEEN_CHARACTERS))),
        "capacities": [] if frames else by_capacity(model, *test),
    }
    del found["unseen"]["class"]
    write_json("result", file, found)
    return found


def shape_of(run: Run) -> Shape:
    """What the formula knows of the model of a run."""
    size, moe = runs.ARCHITECTURE, runs.SPARSE
    patches, pixels, steps = (runs.SIDE // size["patch_size"]) ** 2, size["patch_size"] ** 2, FRAMES // TUBELET
    shape = Shape(
        width=size["embed_dim"],
        depth=size["depth"],
        hidden=int(size["embed_dim"] * size["mlp_ratio"]),
        patches=steps * patches,
        values=TUBELET * pixels,
        classes=len(MOTIONS) * len(runs.CHARACTERS),
    )
    if run.name == "dense":
        return shape
    routed = {
        "experts": moe["num_experts"],
        "selected": moe["num_selected_experts"],
        "capacity": moe["capacity_factor"],
    }
    shape = replace(shape, sparse=size["depth"] // 2, **routed)
    return replace(shape, patches=patches, values=pixels, group=steps) if run.name == "frames" else shape


def flops_of(model: nn.Module) -> float:
    """FLOPs of a forward of a clip."""
    return count_flops(model, torch.zeros(1, 1, FRAMES, runs.SIDE, runs.SIDE)).total


def whole(clips: Clips) -> tuple[np.ndarray, Tensor]:
    """All clips (N, T, S, S), and their labels (N,)."""
    drawn, labels = zip(*(clips[number] for number in range(len(clips))))
    return np.stack(drawn), torch.tensor(labels)


@torch.no_grad()
def accuracies(model: nn.Module, clips: np.ndarray, labels: Tensor) -> dict[str, float | list[float]]:
    """Shares of the clips.

    Args:
        model: in eval mode.
        clips: (N, T, S, S).
        labels: (N,), of as many characters as the model has, of which the motion is all that the others say.

    Returns:
        "class", how often motion and character are right; "motion", the motion; "pair", it or the same backwards;
        "direction", how often the motion is likelier than the same backwards; "by_motion", "motion" of each of
        `MOTIONS`.
    """
    parts = [clips[begin : begin + TOGETHER] for begin in range(0, len(clips), TOGETHER)]
    probabilities = torch.cat([model(as_input(part)).softmax(1) for part in parts])
    motions = labels // len(runs.CHARACTERS)
    of_motion = probabilities.unflatten(1, (len(MOTIONS), -1)).sum(2)
    pairs = of_motion.unflatten(1, (-1, 2)).sum(2).argmax(1)
    own, other = (of_motion.gather(1, each[:, None]) for each in (motions, motions ^ 1))
    right = of_motion.argmax(1) == motions
    return {
        "class": _share(probabilities.argmax(1) == labels),
        "motion": _share(right),
        "pair": _share(pairs == motions // 2),
        "direction": _share(own > other),
        "by_motion": [_share(right[motions == number]) for number in range(len(MOTIONS))],
    }


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def by_capacity(model: nn.Module, clips: np.ndarray, labels: Tensor) -> list[dict]:
    """Accuracy and FLOPs at falling capacities, vanilla and BPR; nothing of a model without experts."""
    rows: list[dict] = []
    for capacity in CAPACITY_FACTORS if moe_layers(model) else ():
        for priority in (False, True):
            with routing(model, capacity_factor=capacity, batch_priority=priority):
                found = accuracies(model, clips, labels)
                row = {"capacity_factor": capacity, "batch_priority": priority, "flops": flops_of(model)}
            rows.append({**row, **{name: found[name] for name in ("class", "motion", "direction")}})
    return rows
