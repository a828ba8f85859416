"""The trainings of the study: their names, their models, and how each is trained and goes on when stopped.

Sizes and seeds are stated here and nowhere else.

Dims: B clips of T frames of S x S pixels.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmoe_torch  # noqa: F401  registers the models
from benchmarks.studies.motion.clips import Clips
from benchmarks.studies.motion.draw import MOTIONS
from vmoe_torch.files import replacing
from vmoe_torch.models.inflation import inflate

CHARACTERS = "ABEFGKRS"
# Nobody is trained on these.
UNSEEN_CHARACTERS = "CHJLPQTY"
FRAMES, SIDE, TUBELET = 8, 32, 2
# Of every face, character and motion: 12 faces make 49,152 clips to train on.
TRAINING_CLIPS, TEST_CLIPS = 64, 2
BATCH = 64
LR, WEIGHT_DECAY, WARMUP = 2e-3, 0.05, 60
# Of weights, batches and noise.
SEED = 0
# Of a pixel's share of white.
MEAN, STD = 0.1, 0.3
# A checkpoint so often, in seconds.
EVERY = 60.0
WEIGHTS, FONTS = "last.pt", "fonts"
ARCHITECTURE: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_token": False,
    "global_pool": "avg",
}
SPARSE: dict[str, Any] = {
    "moe_layers": "every2",
    "num_experts": 8,
    "num_selected_experts": 1,
    "capacity_factor": 1.05,
    "capacity_multiple_of": 1,
}
DENSE: dict[str, Any] = {"moe_layers": ()}


@dataclass(frozen=True)
class Run:
    """A training."""

    name: str
    """Of its folder and in the results."""
    title: str
    """What the page calls it."""
    updates: int
    """Of BATCH clips."""
    after: str | None = None
    """The run whose weights this one begins with."""


RUNS = (
    Run("video", "video V-MoE", 400),
    Run("frames", "frame-by-frame V-MoE", 400),
    Run("dense", "video ViT, dense", 400),
    Run("inflated", "video V-MoE, inflated from the frame-by-frame one", 100, after="frames"),
)


class FrameByFrame(nn.Module):
    """A model of images on every frame of a clip, the logits averaged: blind to the order of the frames.

    In training it sees one frame of each tubelet, so that it has as many tokens as the video model.

    Args:
        image: (N, C, H, W) -> (N, classes).

    Shape:
        (B, C, T, H, W) -> (B, classes).
    """

    def __init__(self, image: nn.Module):
        super().__init__()
        self.image = image

    def forward(self, clips: Tensor) -> Tensor:
        if self.training:
            clips = clips[:, :, int(torch.randint(TUBELET, ())) :: TUBELET]
        frames = clips.transpose(1, 2)
        return self.image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(1)


def build(run: Run, folder: Path) -> nn.Module:
    """The model of a run with the weights that it begins with; runs lie beside each other in a folder."""
    classes = len(MOTIONS) * len(CHARACTERS)
    if run.name == "inflated":
        image = trained(next(other for other in RUNS if other.name == run.after), folder).image
        return inflate(image.train(), frames=FRAMES, tubelet_size=TUBELET)
    if run.name == "frames":
        # A group is half a clip: as many patches as the video model has in a clip.
        arguments = {**ARCHITECTURE, **SPARSE, "group_size": FRAMES // TUBELET}
        return FrameByFrame(timm.create_model("vmoe_s32", num_classes=classes, **arguments))
    arguments = {**ARCHITECTURE, **(DENSE if run.name == "dense" else SPARSE)}
    sizes = {"num_frames": FRAMES, "tubelet_size": TUBELET}
    return timm.create_model("vmoe_video_s16", num_classes=classes, **arguments, **sizes)


def trained(run: Run, folder: Path) -> nn.Module:
    """The model of a run with its last weights, in eval mode."""
    model = build(run, folder)
    model.load_state_dict(torch.load(folder / run.name / WEIGHTS)["model"])
    return model.eval()


def clips_of(folder: Path, split: str, characters: str | None = None) -> Clips:
    """Clips of a split, of the characters that are trained on or of others; the folder of runs holds the fonts."""
    count = TRAINING_CLIPS if split == "train" else TEST_CLIPS
    return Clips(folder / FONTS, split, characters or CHARACTERS, clips=count, frames=FRAMES, side=SIDE)


def as_input(clips: np.ndarray) -> Tensor:
    """What models take of (B, T, S, S) uint8: (B, 1, T, S, S) float32."""
    return (torch.from_numpy(clips).float().div(255) - MEAN).div(STD).unsqueeze(1)


def train(run: Run, data: Clips, folder: Path, deadline: float = math.inf) -> float | None:
    """Trains, or goes on where it was stopped: what an update sees and draws depends on its number alone.

    Args:
        run: what to train.
        data: of the training split.
        folder: of all runs.
        deadline: of time.monotonic(), to stop at with a checkpoint.

    Returns:
        Seconds of the processor that all updates took; None if there are some left.
    """
    file = folder / run.name / WEIGHTS
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model = build(run, folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    update, seconds = 0, 0.0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        update, seconds = state["update"], state["seconds"]
    saved, begin = time.monotonic(), time.process_time()
    while update < run.updates:
        torch.manual_seed((SEED << 32) + update)
        chosen = np.random.default_rng((SEED, update)).integers(len(data), size=BATCH)
        clips, labels = zip(*(data[int(index)] for index in chosen))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, run.updates)
        loss = F.cross_entropy(model(as_input(np.stack(clips))), torch.tensor(labels))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update += 1
        if update % 50 == 0:
            print(f"{run.name}: update {update} of {run.updates}, loss {loss.item():.3f}", flush=True)
        stopped = time.monotonic() > deadline
        if stopped or update == run.updates or time.monotonic() - saved > EVERY:
            seconds, begin = seconds + time.process_time() - begin, time.process_time()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(file) as partial:
                torch.save({**state, "update": update, "seconds": seconds}, partial)
            saved = time.monotonic()
        if stopped:
            break
    return seconds if update == run.updates else None


def learning_rate(update: int, updates: int) -> float:
    """Rises for WARMUP updates, then falls along a cosine."""
    warmup = min(WARMUP, updates // 4)
    if update < warmup:
        return LR * (update + 1) / warmup
    return LR * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup)))
