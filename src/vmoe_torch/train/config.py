"""The configuration of a training run: nested dataclasses, read from JSON and changed by `key=value`.

Every error names the path of the key, the rule and what was got. Over 400 lines: all keys of a run stand in one place.
"""

import difflib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from vmoe_torch.data.named import NUMBERED, STREAMS
from vmoe_torch.data.shards import WDS
from vmoe_torch.data.typefaces import TYPEFACES
from vmoe_torch.data.video import VIDEO
from vmoe_torch.train.arguments import suggestions
from vmoe_torch.train.idle_keys import check_idle, idle, reset
from vmoe_torch.train.overrides import Text, changed, read_object
from vmoe_torch.train.rules import (
    DEVICE,
    SOMETHING,
    Each,
    Number,
    OneOf,
    check,
    check_declared,
    count,
    declared,
    meant,
)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("cosine", "linear", "tanh", "poly", "step", "wsd", "rsqrt", "constant", "none")
# Of an image, as timm calls them; "random" is for training only.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
POSITIVE, NOT_NEGATIVE, SHARE = Number(0, open_low=True), Number(0), Number(0, 1)
ELEMENTWISE = ("adam", "adamw", "nadamw", "lion", "sgd", "momentum")


@dataclass(frozen=True)
class ModelConfig:
    """A timm model by name, and the weights it begins with."""

    name: Annotated[str, SOMETHING] = "vmoe_s32"
    """As `timm.create_model` takes it."""
    pretrained: bool = False
    """Begin with the weights that timm has for the name."""
    checkpoint: Annotated[str | None, SOMETHING] = None
    """Weights to begin with: a run folder or checkpoint file, a .safetensors file, a PREFIX of the original's files, or
    the tag of a released model. Other resolutions and numbers of classes are adapted."""
    drop_head: bool = False
    """Begin with a new head even where the checkpoint's has as many classes."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor, as model.kwargs.num_experts=8."""
    upcycle: dict[str, Any] = field(default_factory=dict)
    """Arguments of `upcycle`, as upcycle.num_experts=8: the model, with its weights, is dense and becomes sparse."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and timm's transforms."""

    name: Annotated[str, SOMETHING] = "folder"
    """One of "folder", "video", "fashion_mnist", "typefaces", "wds/" for WebDataset's shards, or a data set of timm's
    `create_dataset` whose images have numbers, as "torch/cifar10" or "hfds/NAME"."""
    root: Annotated[str | None, SOMETHING] = None
    """Of folder and video: one folder per split, which holds one folder per class, with files at any depth. Of
    fashion_mnist: the full IDX files. Of typefaces: one folder of fonts per split. Of wds/: the shards. Of timm's: the
    files."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `Typefaces`, as data.kwargs.side=64."""
    train_split: Annotated[str, SOMETHING] = "train"
    """Name of the split to train on; "training" means the same as "train"."""
    val_split: Annotated[str, SOMETHING] = "val"
    """Name of the split to validate on; "val", "valid" and "validation" mean the same."""
    batch_size: Annotated[int, count(1)] = 128
    """Images per update over all processes, at least 1."""
    eval_batch_size: Annotated[int, count(1)] = 128
    """Images per process in one forward of the validation, at least 1."""
    workers: Annotated[int, count(0)] = 0
    """Processes that load, per training process; 0 loads in the training process itself."""
    prefetch: Annotated[int, count(1)] = 2
    """Batches that each loading process has ready, at least 1."""
    max_broken: Annotated[int, count(0)] = 0
    """Broken images that are skipped, in training and in validation each; the next one stops the run. Another image
    takes the place of a broken one in training, in validation it does not count. Each process counts its own."""
    exif: bool = False
    """Turn images as their EXIF orientation says. The original does not; commands do as the model's run did."""
    frames: Annotated[int | None, count(1)] = None
    """Of video: frames of a clip, at least 1; None is the model's."""
    frame_stride: Annotated[float | None, POSITIVE] = None
    """Of video: every so many-th frame is one of the clip, at the video's mean rate; None is the model's, or 1."""
    fps: Annotated[float | None, POSITIVE] = None
    """Of video: frames a second of a clip, whatever the video's rate, in place of data.frame_stride."""
    mean: Annotated[tuple[float, ...] | None, Each(Number())] = None
    """Subtracted from pixels in 0..1, one per channel or one for all; None is the model's."""
    std: Annotated[tuple[float, ...] | None, Each(POSITIVE)] = None
    """Divides what the mean leaves, above 0, one per channel or one for all; None is the model's."""
    interpolation: Annotated[str, SOMETHING] = "bicubic"
    """timm's name of the filter that resizes; "random" is for training only."""
    crop_pct: Annotated[float | None, Number(0.05, 1)] = None
    """Share of an image's side that evaluation sees, in 0.05..1; None is the model's."""
    crop_mode: Annotated[str | None, OneOf(("center", "squash", "border"))] = None
    """For evaluation, as timm has it: "center", "squash" or "border"; None is the model's."""
    augment: bool = True
    """Change training images at random, as the keys from here on say; mixup and cutmix stay without it."""
    scale: Annotated[tuple[float, float], Each(Number(0, 1, open_low=True), ascending=True)] = (0.08, 1.0)
    """Least and largest share of the image's area that a crop shows, in (0, 1]."""
    ratio: Annotated[tuple[float, float], Each(POSITIVE, ascending=True)] = (0.75, 4 / 3)
    """Least and largest width of a crop over its height, above 0."""
    hflip: Annotated[float, SHARE] = 0.5
    """Probability that an image is mirrored, in 0..1."""
    color_jitter: Annotated[float, NOT_NEGATIVE] = 0.0
    """Largest relative change of brightness, contrast and saturation; 0 changes none."""
    auto_augment: Annotated[str | None, SOMETHING] = None
    """timm's RandAugment and AutoAugment strings, as "rand-m10-n2"."""
    random_erasing: Annotated[float, SHARE] = 0.0
    """Probability that a rectangle of an image is erased, in 0..1."""
    distort: Annotated[float, Number(0, 2)] = 1.0
    """How strongly characters of typefaces are distorted, in 0..2: times the defaults of `Distort`."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Concentration of the distribution that images are mixed by; 0 mixes none."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """The same for pasting a part of one image into another; beside mixup, one of the two is drawn."""
    mixup_mode: Annotated[str, OneOf(("batch", "pair", "elem", "dirichlet"))] = "batch"
    """timm's "batch", "pair" or "elem", or "dirichlet", the original's (without cutmix)."""


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy."""

    kind: Annotated[str, OneOf(("softmax", "sigmoid"))] = "softmax"
    """Over a "softmax", or over one "sigmoid" per class, summed over classes."""
    label_smoothing: Annotated[float, Number(0, 1, open_high=True)] = 0.0
    """Share of a target that all classes have in equal parts, in [0, 1)."""


@dataclass(frozen=True)
class OptimConfig:
    """timm's optimisers."""

    name: Annotated[str, SOMETHING] = "adamw"
    """As timm calls it."""
    lr: Annotated[float, NOT_NEGATIVE] = 1e-3
    """Peak learning rate, at least 0."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    """Strength of the decay, at least 0."""
    decay: Annotated[str, OneOf(("default", "kernels"))] = "default"
    """What decays: "default" is all but biases, norms and what the model names in no_weight_decay(); "kernels" is the
    original's, weights of linear layers and convolutions alone, and the scale of soft routers."""
    head_weight_decay: Annotated[float | None, NOT_NEGATIVE] = None
    """Strength of the decay of the head's weight, with decay="kernels"; None is `weight_decay`."""
    betas: Annotated[tuple[float, float] | None, Each(Number(0, 1, open_high=True))] = None
    """Decays of Adam's two averages, each in [0, 1); None is the optimiser's own."""
    momentum: Annotated[float, Number(0, 1, open_high=True)] = 0.9
    """Of optimisers that have one, in [0, 1)."""
    eps: Annotated[float | None, NOT_NEGATIVE] = None
    """Added where the optimiser divides, at least 0; None is the optimiser's own."""
    fallback_lr_scale: Annotated[float, POSITIVE] = 1.0
    """Of Muon: learning rate of what it leaves to AdamW (routers, vectors) over that of the rest, above 0."""
    muon_experts: bool = True
    """Of Muon: whether it makes every expert's matrices orthogonal, as it does those of dense layers; otherwise the
    experts are left to AdamW as well."""
    layer_decay: Annotated[float | None, Number(0, 1, open_low=True)] = None
    """Learning rate of a block over that of the block above it, in (0, 1]; None is one rate for all."""
    clip_norm: Annotated[float | None, Number(0, open_low=True, finite=False, or_null=True)] = 1.0
    """Largest global norm of the gradient, above 0; None does not clip."""
    accumulation: Annotated[int, count(1)] = 1
    """Forwards per update, at least 1."""
    ema_decay: Annotated[float | None, Number(0, 1, open_high=True)] = None
    """Decay of the moving average of the weights, in [0, 1); None keeps none."""
    ema_warmup: bool = True
    """Whether the decay after n updates is at most 1 - n^(-2/3): an average that remembers the random weights of the
    beginning is worth nothing, and one of decay 0.9999 remembers some 30,000 updates."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate, set at every update; a length in updates counts instead of one in epochs."""

    name: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    """timm's schedules, "linear" to `min_lr`, or "none" for one rate throughout."""
    epochs: Annotated[int, count(1)] = 10
    """Length of the run in epochs, at least 1."""
    updates: Annotated[int | None, count(1)] = None
    """Length of the run in updates, at least 1."""
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0
    """Length of the linear warm-up in epochs, at least 0; fractions are allowed."""
    warmup_updates: Annotated[int | None, count(0)] = None
    """Length of the linear warm-up in updates, at least 0."""
    warmup_prefix: bool = False
    """Whether the decay begins where the warm-up ends, at the peak, as the original's does (and "linear" always);
    timm's goes on under the warm-up."""
    warmup_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate that the warm-up begins with, at least 0."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate that the schedule ends with, at least 0."""
    decay_epochs: Annotated[float, POSITIVE] = 30.0
    """Of "step": epochs between two steps, above 0."""
    decay_rate: Annotated[float, POSITIVE] = 0.1
    """Factor of each step of "step", power of "poly"; above 0."""

    def total(self, updates_per_epoch: int) -> int:
        """Length of the run in updates."""
        return self.epochs * updates_per_epoch if self.updates is None else self.updates

    def warmup(self, updates_per_epoch: int) -> float:
        """Length of the warm-up in updates."""
        return self.warmup_epochs * updates_per_epoch if self.warmup_updates is None else self.warmup_updates


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share the model; with ep=1 and without fsdp each holds all of it (DDP)."""

    ep: Annotated[int, count(1)] = 1
    """Processes that one set of experts is spread over, at least 1."""
    dp: Annotated[int | None, count(1)] = None
    """Sets of experts, at least 1; None is processes / ep."""
    fsdp: bool = False
    """Spread parameters, gradients and moments with FSDP2; always on where ep is above 1."""
    wire: Annotated[str | None, OneOf(("bfloat16", "float32"))] = None
    """dtype of rows on their way between experts, "bfloat16" or "float32"; None is that of the activations."""
    chunks: Annotated[int, count(1)] = 1
    """Parts whose exchange overlaps the experts' work, at least 1."""
    ranks_per_node: Annotated[int, count(0)] = 0
    """M > 1: exchange inside nodes of M processes first, then between nodes."""
    materialize: bool = False
    """Each process makes its own part of the weights, so that none holds the model; others than without, but the same
    for any number of processes."""
    recompute: bool = False
    """Recompute activations in the backward, all but the routing."""
    timeout: Annotated[float, Number(1, 1e7)] = 600.0
    """Seconds after which a process that waits for another gives up, in 1..1e7."""

    @property
    def enabled(self) -> bool:
        """Whether the model is spread over the processes."""
        return self.ep > 1 or self.fsdp


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run runs; nothing here but `seed` and `precision` changes what is computed."""

    output: Annotated[str, SOMETHING] = "runs/vmoe"
    """Folder that everything is written to."""
    seed: Annotated[int, count(0)] = 0
    """Of weights, order of images, augmentations and the router's noise; at least 0."""
    device: Annotated[str, DEVICE] = "auto"
    """As "cpu", "cuda" or "cuda:N"; "auto" is CUDA where there is one."""
    precision: Annotated[str, OneOf(tuple(PRECISIONS))] = "float32"
    """dtype that autocast computes in: "float32" (none), "bfloat16" or "float16"."""
    compile: bool = False
    """Run the model through `torch.compile`."""
    deterministic: bool = True
    """CUDA only: bit-equal runs, at some cost of speed. CPU runs always are."""
    checkpoint_every: Annotated[int | None, count(1)] = None
    """Updates between checkpoints, at least 1, beside one at every end of an epoch; None writes those only."""
    keep_checkpoints: Annotated[int, count(1)] = 2
    """Newest checkpoints that stay, at least 1."""
    log_every: Annotated[int, count(1)] = 10
    """Updates between log points, at least 1."""
    max_updates: Annotated[int | None, count(1)] = None
    """Stop, with a checkpoint, after so many updates, at least 1; the schedule stays that of all epochs."""
    tensorboard: bool = True
    """Write TensorBoard's files."""
    summary: bool = True
    """Write summary.html, at every end of an epoch."""
    progress: bool = True
    """Show the progress on stderr."""


@dataclass(frozen=True)
class AlarmsConfig:
    """What a run warns of, judged at log points; null or false turns an alarm off."""

    expert_share: Annotated[float | None, SHARE] = 0.9
    """Share of the tokens that choose one expert of a layer, in 0..1; above it, the routing has collapsed."""
    dead_after: Annotated[int | None, count(1)] = 20
    """Log points in a row, at least 1, at which no token chooses an expert."""
    loss_spike: Annotated[float | None, Number(1)] = 3.0
    """A loss so many times, at least once, the median of the last `loss_window` log points."""
    loss_window: Annotated[int, count(5)] = 50
    """Log points that the median is of, at least 5."""
    stop_not_finite: bool = True
    """NaN or Inf in the loss, the gradient or the weights stops the run, before a checkpoint is written."""
    find_not_finite: bool = True
    """Then train again from the last checkpoint up to that update, to name the module in which it begins."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """On which images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """For which loss, beside the routers' own."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """With which optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How long, and with which learning rates."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    """What a run warns of."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where and how it runs."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dict that JSON can hold."""
        return json.loads(self.to_json())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The defaults, changed by a nested dict.

        Raises:
            ValueError: if a key is unknown or a value has the wrong type.
        """
        return changed(cls(), values)

    @classmethod
    def from_file(cls, path: Path | str) -> "Config":
        """The defaults, changed by a JSON file.

        Raises:
            ValueError: as from_dict, and if the file cannot be read.
        """
        return cls.from_dict(read_object(path))

    def to_json(self) -> str:
        """As `from_file` reads it."""
        return json.dumps(asdict(self), indent=2)

    def override(self, *assignments: str) -> "Config":
        """Changed by "path=value" strings, as "optim.lr=3e-4" or "model.kwargs.num_experts=8"; later ones win.

        Values are JSON where the key's type wants it; strings need no quotes, tuples no brackets ("0.9,0.95"), and yes,
        no, on and off are true and false. Keys that change nothing any more, as the warm-up after "schedule.name=none",
        go back to their defaults unless they are among the assignments.

        Raises:
            ValueError: if a path is unknown or a value does not fit.
        """
        config, given = self, set()
        # Names of keys and of sections: others may be meant for the model.
        known = {name for path, _, _ in declared(type(self)) for name in path.split(".")}
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"an override must read key=value, got {assignment!r}")
            *parents, name = path.split(".")
            free = parents[:2] in (["model", "kwargs"], ["model", "upcycle"])
            alike = [] if free or name in known else suggestions(name)
            if alike and (alike[0].endswith(f".{name}") or not difflib.get_close_matches(name, known)):
                raise ValueError(f"unknown config key {path!r}{meant(alike)}")
            values: Any = {name: Text(text)}
            for parent in reversed(parents):
                values = {parent: values}
            config = changed(config, values)
            # Of an argument in a key, the key.
            given.add(".".join(path.split(".")[:2]))
        before = idle(self).keys() | given
        while left := idle(config).keys() - before:
            config = reset(config, left)
            before |= left
        return config

    def check(self, given: Collection[str] = ()) -> None:
        """Checks all but the model's arguments and the data, which check their own.

        Args:
            given: keys that somebody asked for, which are refused where they change nothing even at their defaults.

        Raises:
            ValueError: if a value is out of its range, or changes nothing in its combination.
        """
        check_declared(self)
        data = self.data
        check("data must describe timm's transforms: data.interpolation", OneOf(INTERPOLATIONS), data.interpolation)
        if not data.name.startswith((*NUMBERED, *STREAMS)):
            names = ("folder", VIDEO, "fashion_mnist", TYPEFACES, WDS, *(f"{prefix}NAME" for prefix in NUMBERED))
            check("data.name", OneOf(names), data.name)
        if data.mixup_mode == "dirichlet" and data.cutmix > 0:
            raise ValueError(f"data.cutmix must be 0 with data.mixup_mode=dirichlet, got {data.cutmix}")
        held = {TYPEFACES: "fonts", VIDEO: "videos"}.get(data.name)
        if held is None and data.name.startswith(("folder", "torch/", WDS)):
            held = "images"
        if held is not None and data.root is None:
            raise ValueError(f"data.root must name the folder of {held} for data.name={data.name}, got none")
        if self.parallel.enabled:
            self._check_parallel()
        check_idle(self, set(given))

    def _check_parallel(self) -> None:
        """What a model spread over processes cannot do."""
        # Others take norms or products of whole matrices, of which a process has a part.
        check("optim.name with parallel.ep or parallel.fsdp", OneOf(ELEMENTWISE), self.optim.name.lower())
        check("run.precision with parallel.ep or parallel.fsdp", OneOf(("float32", "bfloat16")), self.run.precision)
        model = self.model
        if self.parallel.materialize and (model.pretrained or model.checkpoint is not None or model.upcycle):
            raise ValueError(
                "parallel.materialize must be false with model.pretrained, model.checkpoint or model.upcycle, got true"
            )
        if self.optim.ema_decay is not None:
            raise ValueError(f"optim.ema_decay must be null with parallel.ep or fsdp, got {self.optim.ema_decay}")
