"""The configuration of a training run: nested dataclasses, read from JSON and changed by `key=value`.

Every error names the path of the key, the rule and what was got.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vmoe_torch.data.named import NUMBERED, STREAMS
from vmoe_torch.data.shards import WDS
from vmoe_torch.train.overrides import Text, changed

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("cosine", "linear", "tanh", "poly", "step", "wsd", "rsqrt", "constant", "none")
ELEMENTWISE = ("adam", "adamw", "nadamw", "lion", "sgd", "momentum")


@dataclass(frozen=True)
class ModelConfig:
    """A timm model by name; `kwargs` go to its constructor (`model.kwargs.num_experts=8`)."""

    name: str = "vmoe_s32"
    pretrained: bool = False
    # Weights to begin with: a run folder or checkpoint file, a .safetensors file, a PREFIX of the original's files, or
    # the tag of a released model. Other resolutions and numbers of classes are adapted.
    checkpoint: str | None = None
    # Begin with a new head even where the checkpoint's has as many classes.
    drop_head: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    # Arguments of `upcycle`, as upcycle.num_experts=8: the named model, with its weights, is dense and becomes sparse.
    upcycle: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and timm's transforms; `batch_size` is images per update over all processes."""

    # "folder", "fashion_mnist", "typefaces", "wds/" for WebDataset's shards, or a data set of timm's `create_dataset`
    # whose images have numbers, as "torch/cifar10" or "hfds/NAME".
    name: str = "folder"
    # folder: holds one folder per split, which holds one folder per class. fashion_mnist: the full IDX files. wds/: the
    # shards. typefaces: one folder of fonts per split. timm's: where the files are.
    root: str | None = None
    # Arguments of the data set, as kwargs.side=64; of "typefaces" only.
    kwargs: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    val_split: str = "val"
    batch_size: int = 128
    # Images per process in one forward.
    eval_batch_size: int = 128
    # Processes that load, and batches that each of them has ready.
    workers: int = 0
    prefetch: int = 2
    # Broken images that are skipped, in training and in validation each; the next one stops the run. Another image
    # takes the place of a broken one in training, in validation it does not count. Each process counts its own.
    max_broken: int = 0
    # None: those of the model.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bicubic"
    crop_pct: float | None = None
    # For evaluation, as timm has it: "center", "squash" or "border"; None is the model's.
    crop_mode: str | None = None
    augment: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    # timm's RandAugment and AutoAugment strings, as "rand-m10-n2".
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    # timm's "batch", "pair" or "elem", or "dirichlet", the original's (without cutmix).
    mixup_mode: str = "batch"


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy over a softmax, or over one sigmoid per class, summed over classes."""

    kind: str = "softmax"
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """timm's optimisers."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    # What decays: "default" is all but biases, norms and what the model names in no_weight_decay(); "kernels" is the
    # original's, weights of linear layers and convolutions alone.
    decay: str = "default"
    betas: tuple[float, float] | None = None
    momentum: float = 0.9
    eps: float | None = None
    layer_decay: float | None = None
    # Largest global norm of the gradient; None does not clip.
    clip_norm: float | None = 1.0
    # Forwards per update.
    accumulation: int = 1
    # Decay of the moving average of the weights; None keeps none.
    ema_decay: float | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """timm's schedules, stepped at every update, and "linear"; a length in updates counts instead of one in epochs."""

    name: str = "cosine"
    epochs: int = 10
    updates: int | None = None
    # Linear; fractions are allowed.
    warmup_epochs: float = 0.0
    warmup_updates: int | None = None
    # Whether the decay begins where the warm-up ends, at the peak, as the original's does (and "linear" always);
    # timm's goes on under the warm-up.
    warmup_prefix: bool = False
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    # For "step".
    decay_epochs: float = 30.0
    decay_rate: float = 0.1

    def total(self, updates_per_epoch: int) -> int:
        """Length of the run in updates."""
        return self.epochs * updates_per_epoch if self.updates is None else self.updates

    def warmup(self, updates_per_epoch: int) -> float:
        """Length of the warm-up in updates."""
        return self.warmup_epochs * updates_per_epoch if self.warmup_updates is None else self.warmup_updates


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share the model; with ep=1 and without fsdp each holds all of it (DDP)."""

    # Processes that one set of experts is spread over.
    ep: int = 1
    # Sets of experts; None is processes / ep.
    dp: int | None = None
    # Spread parameters, gradients and moments with FSDP2; always on where ep is above 1.
    fsdp: bool = False
    # dtype of rows on their way between experts, "bfloat16" or "float32"; None is that of the activations.
    wire: str | None = None
    # Parts whose exchange overlaps the experts' work.
    chunks: int = 1
    # M > 1: exchange inside nodes of M processes first, then between nodes.
    ranks_per_node: int = 0
    # Each process makes its own part of the weights, so that none holds the model; others than without, but the same
    # for any number of processes.
    materialize: bool = False
    # Recompute activations in the backward, all but the routing.
    recompute: bool = False
    # Seconds after which a process that waits for another gives up.
    timeout: float = 600.0

    @property
    def enabled(self) -> bool:
        """Whether the model is spread over the processes."""
        return self.ep > 1 or self.fsdp


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run runs; nothing here but `seed` and `precision` changes what is computed."""

    output: str = "runs/vmoe"
    seed: int = 0
    # "auto" is CUDA where there is one.
    device: str = "auto"
    precision: str = "float32"
    compile: bool = False
    # CUDA only: bit-equal runs, at some cost of speed. CPU runs always are.
    deterministic: bool = True
    # In updates, beside one at every end of an epoch; None writes those only.
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    # In updates.
    log_every: int = 10
    # Stop, with a checkpoint, after so many updates; the schedule stays that of all epochs.
    max_updates: int | None = None
    tensorboard: bool = True
    # summary.html, at every end of an epoch.
    summary: bool = True
    progress: bool = True


@dataclass(frozen=True)
class AlarmsConfig:
    """What a run warns of, judged at log points; null or false turns an alarm off."""

    # Share of the tokens that choose one expert of a layer; above it, the routing has collapsed.
    expert_share: float | None = 0.9
    # Log points in a row at which no token chooses an expert.
    dead_after: int | None = 20
    # A loss so many times the median of the last `loss_window` log points.
    loss_spike: float | None = 3.0
    loss_window: int = 50
    # NaN or Inf in the loss, the gradient or the weights stops the run, before a checkpoint is written.
    stop_not_finite: bool = True
    # Then train again from the last checkpoint up to that update, to name the module in which it begins.
    find_not_finite: bool = True


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    run: RunConfig = field(default_factory=RunConfig)

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
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"config file {path} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"config file {path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def to_json(self) -> str:
        """As `from_file` reads it."""
        return json.dumps(asdict(self), indent=2)

    def override(self, *assignments: str) -> "Config":
        """Changed by "path=value" strings, as "optim.lr=3e-4" or "model.kwargs.num_experts=8"; later ones win.

        Values are JSON where the key's type wants it; strings need no quotes, tuples no brackets ("0.9,0.95").

        Raises:
            ValueError: if a path is unknown or a value does not fit.
        """
        config = self
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"an override must read key=value, got {assignment!r}")
            *parents, name = path.split(".")
            values: Any = {name: Text(text)}
            for parent in reversed(parents):
                values = {parent: values}
            config = changed(config, values)
        return config

    def check(self) -> None:
        """Raises ValueError if a value is out of its range; the model and the data check their own."""
        data, optim, schedule, run = self.data, self.optim, self.schedule, self.run
        if not data.name.startswith((*NUMBERED, *STREAMS)):
            names = ("folder", "fashion_mnist", "typefaces", WDS, *(f"{prefix}NAME" for prefix in NUMBERED))
            _one_of("data.name", data.name, names)
        _one_of("loss.kind", self.loss.kind, ("softmax", "sigmoid"))
        _one_of("run.device", run.device.partition(":")[0], ("auto", "cpu", "cuda"))
        _one_of("run.precision", run.precision, tuple(PRECISIONS))
        # "plateau" follows the validation, not the updates, and could not resume exactly.
        _one_of("schedule.name", schedule.name, SCHEDULES)
        _one_of("optim.decay", optim.decay, ("default", "kernels"))
        _one_of("data.mixup_mode", data.mixup_mode, ("batch", "pair", "elem", "dirichlet"))
        if data.mixup_mode == "dirichlet" and data.cutmix > 0:
            raise ValueError(f"data.cutmix must be 0 with data.mixup_mode=dirichlet, got {data.cutmix}")
        if data.kwargs and data.name != "typefaces":
            raise ValueError(f"data.kwargs must be empty for data.name={data.name}, got {data.kwargs}")
        if data.name.startswith(("folder", "typefaces", "torch/", WDS)) and data.root is None:
            raise ValueError(f"data.root must name the folder of images for data.name={data.name}, got none")
        for name, value, least in (
            ("data.batch_size", data.batch_size, 1),
            ("data.eval_batch_size", data.eval_batch_size, 1),
            ("data.workers", data.workers, 0),
            ("data.prefetch", data.prefetch, 1),
            ("data.max_broken", data.max_broken, 0),
            ("data.mixup", data.mixup, 0),
            ("data.cutmix", data.cutmix, 0),
            ("optim.lr", optim.lr, 0),
            ("optim.weight_decay", optim.weight_decay, 0),
            ("optim.accumulation", optim.accumulation, 1),
            ("schedule.epochs", schedule.epochs, 1),
            ("schedule.updates", schedule.updates, 1),
            ("schedule.warmup_updates", schedule.warmup_updates, 0),
            ("schedule.warmup_epochs", schedule.warmup_epochs, 0),
            ("parallel.ep", self.parallel.ep, 1),
            ("parallel.dp", self.parallel.dp, 1),
            ("parallel.chunks", self.parallel.chunks, 1),
            ("parallel.ranks_per_node", self.parallel.ranks_per_node, 0),
            ("parallel.timeout", self.parallel.timeout, 1),
            ("alarms.expert_share", self.alarms.expert_share, 0),
            ("alarms.dead_after", self.alarms.dead_after, 1),
            ("alarms.loss_spike", self.alarms.loss_spike, 1),
            ("alarms.loss_window", self.alarms.loss_window, 5),
            ("run.seed", run.seed, 0),
            ("run.keep_checkpoints", run.keep_checkpoints, 1),
            ("run.log_every", run.log_every, 1),
            ("run.checkpoint_every", run.checkpoint_every, 1),
            ("run.max_updates", run.max_updates, 1),
        ):
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, got {value}")
        if optim.clip_norm is not None and not optim.clip_norm > 0:
            raise ValueError(f"optim.clip_norm must be above 0 or null, got {optim.clip_norm}")
        for name, value in (("optim.ema_decay", optim.ema_decay), ("loss.label_smoothing", self.loss.label_smoothing)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.parallel.enabled:
            self._check_parallel()

    def _check_parallel(self) -> None:
        """What a model spread over processes cannot do."""
        wire = self.parallel.wire
        if wire is not None:
            _one_of("parallel.wire", wire, ("bfloat16", "float32"))
        # Others take norms or products of whole matrices, of which a process has a part.
        _one_of("optim.name with parallel.ep or parallel.fsdp", self.optim.name.lower(), ELEMENTWISE)
        _one_of("run.precision with parallel.ep or parallel.fsdp", self.run.precision, ("float32", "bfloat16"))
        model = self.model
        if self.parallel.materialize and (model.pretrained or model.checkpoint is not None or model.upcycle):
            raise ValueError(
                "parallel.materialize must be false with model.pretrained, model.checkpoint or model.upcycle, got true"
            )
        if self.optim.ema_decay is not None:
            raise ValueError(f"optim.ema_decay must be null with parallel.ep or fsdp, got {self.optim.ema_decay}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
