"""What a configuration names, built: the data, the model, the transforms, the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from vmoe_torch.data import ClipTiming, ClipTransform, Distort, ImageFolder, Typefaces, described, open_data
from vmoe_torch.data import fashion_mnist as fm
from vmoe_torch.data.factory import FASHION_MNIST
from vmoe_torch.data.names import shown, some
from vmoe_torch.data.typefaces import TYPEFACES
from vmoe_torch.data.video import VIDEO
from vmoe_torch.layers import MoeMlp
from vmoe_torch.models.upcycling import upcycle
from vmoe_torch.train.arguments import data_arguments, model_arguments, upcycle_arguments
from vmoe_torch.train.config import Config, DataConfig, ModelConfig
from vmoe_torch.train.mixup import DirichletMixup
from vmoe_torch.train.rules import OneOf, check, near


@dataclass
class Splits:
    """Training and validation images, and the names of their classes."""

    train: Dataset
    """Training images."""
    val: Dataset
    """Validation images."""
    class_names: tuple[str, ...]
    """Names of the classes, by label."""

    def facts(self) -> dict[str, dict[str, Any]]:
        """Of each split, how many images and classes it has, and a digest of its list of images."""
        return {
            split: {"images": len(data), "classes": len(self.class_names), "digest": data.digest()}
            for split, data in (("train", self.train), ("val", self.val))
        }

    def lines(self) -> list[str]:
        """The same for people, and what was passed over."""
        return [
            f"{split}{f', {shown(data.root)}' if isinstance(data, ImageFolder | Typefaces) else ''}: {described(data)}"
            for split, data in (("train", self.train), ("val", self.val))
        ]

    def notices(self) -> list[str]:
        """What was passed over."""
        splits = (("train", self.train), ("val", self.val))
        return [f"{split}: {notice}" for split, data in splits for notice in getattr(data, "notices", ())]


def build_data(config: DataConfig, mode: str = "RGB") -> Splits:
    """Both splits.

    Args:
        config: the data's configuration.
        mode: PIL mode of the images, "RGB" or "L".

    Raises:
        ValueError: if a folder or file is missing or empty, the splits' classes disagree, or a data set has no names
            of classes or gives its images in an order of its own only.
    """
    arguments = {"mode": mode, "exif": config.exif, **data_arguments(config.name, config.kwargs)}
    train = open_data(config.name, config.root, config.train_split, **arguments)
    # A model would be given outputs that it never learns.
    if isinstance(train, ImageFolder) and train.empty:
        raise ValueError(
            f"class folders in {shown(train.root)} must hold an image each, got {'; '.join(train.notices)}"
        )
    if isinstance(train, Typefaces) and train.empty:
        empty = some(train.empty)
        raise ValueError(f"characters must each be in a font of {shown(train.root)}, got {empty} that no face has")
    val = open_data(config.name, config.root, config.val_split, class_names=train.class_names, **arguments)
    if train.class_names is None or train.class_names != val.class_names:
        counts = ["none" if data.class_names is None else str(len(data.class_names)) for data in (train, val)]
        raise ValueError(f"both splits of {config.name} must name the same classes, got {' and '.join(counts)}")
    return Splits(train, val, train.class_names)


def check_alike(facts: list[dict[str, dict[str, Any]]]) -> None:
    """Raises ValueError, in every process, if the processes see other images or classes."""
    for rank, own in enumerate(facts):
        for split, first in facts[0].items():
            if own[split] != first:
                seen = (f"{each['images']:,} images in {each['classes']:,} classes" for each in (first, own[split]))
                raise ValueError(
                    f"images of data.{split}_split must be the same for every process, got {next(seen)} in process 0, "
                    f"{next(seen)} in process {rank}, and their names or labels differ"
                )


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The timm model, upcycled where the configuration says so, with weights of its own.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    return upcycled(create_model(config, num_classes), config)


def create_model(config: ModelConfig, num_classes: int, pretrained: bool = False) -> nn.Module:
    """The timm model as timm makes it.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    if not timm.is_model(config.name):
        hint = near(config.name, timm.list_models())
        raise ValueError(f"model.name must be a timm model, got {config.name!r}{hint}")
    kwargs = {"num_classes": num_classes, **model_arguments(config.name, config.kwargs)}
    try:
        return timm.create_model(config.name, pretrained=pretrained, **kwargs)
    # Constructors fail in their own ways at what they do not expect; what fails without being asked for is no such.
    except Exception as error:
        if not config.kwargs and not pretrained:
            raise
        key = _culprit(config) or ("model.pretrained and model.kwargs" if pretrained else "model.kwargs")
        raise ValueError(f"{key} of {config.name}: {_told(error)}") from error


def _culprit(config: ModelConfig) -> str | None:
    """The one argument without which the model can be built, if there is one."""
    found = []
    for name in config.kwargs:
        rest = {other: value for other, value in config.kwargs.items() if other != name}
        try:
            with torch.device("meta"):
                timm.create_model(config.name, **model_arguments(config.name, rest))
        except Exception:
            continue
        found.append(name)
    return f"model.kwargs.{found[0]}={config.kwargs[found[0]]!r}" if len(found) == 1 else None


def _told(error: Exception) -> str:
    """An error's text, with its kind where the text alone says little."""
    text = str(error)
    if not text:
        return type(error).__name__
    return (
        f"{type(error).__name__} {text}" if isinstance(error, LookupError | AttributeError | ArithmeticError) else text
    )


def upcycled(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model made sparse as `config.upcycle` says, or itself.

    Raises:
        ValueError: if the model has no MLPs that can become experts, or an argument does not fit.
    """
    if not config.upcycle:
        return model
    arguments = upcycle_arguments(config.name, upcycle, MoeMlp, config.upcycle)
    try:
        return upcycle(model, **arguments)
    except Exception as error:
        raise ValueError(f"model.upcycle of {config.name}: {_told(error)}") from error


def image_mode(config: ModelConfig) -> str:
    """PIL mode of the images that the model takes.

    Raises:
        ValueError: if images have no such number of channels.
    """
    channels = config.kwargs.get("in_chans", 3)
    check("model.kwargs.in_chans", OneOf((1, 3)), channels)
    return "L" if channels == 1 else "RGB"


def build_transforms(config: DataConfig, model: nn.Module) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """timm's transforms for training and for evaluation, at the model's own image size.

    Returns:
        (training transform, evaluation transform), PIL image -> (C, H, W) float32; of videos, `Video` -> (C, T, H, W):
        a clip at random, or the one in the middle.

    Raises:
        ValueError: if timm does not take a value, or the model takes no such clips.
    """
    train, evaluation = _image_transforms(config, model)
    if config.name != VIDEO:
        return train, evaluation
    try:
        timing = ClipTiming.of(model, config.frames, config.frame_stride, config.fps)
    except ValueError as error:
        raise ValueError(f"data.name=video: {error}") from None
    return ClipTransform(train, timing, clips=None), ClipTransform(evaluation, timing)


def _image_transforms(config: DataConfig, model: nn.Module) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    size = resolve_data_config({}, model=model)
    height, width = size["input_size"][1:]
    channels = size["input_size"][0]
    if hasattr(model, "patch_embed"):
        height, width = model.patch_embed.img_size or (height, width)
        channels = model.patch_embed.proj.in_channels
    mean, std = normalisation(config, model)
    common = {
        "input_size": (channels, height, width),
        "interpolation": config.interpolation,
        "mean": mean,
        "std": std,
    }
    crop_pct = size["crop_pct"] if config.crop_pct is None else config.crop_pct
    crop_mode = size["crop_mode"] if config.crop_mode is None else config.crop_mode
    evaluation = create_transform(**common, crop_pct=crop_pct, crop_mode=crop_mode)
    if config.name == TYPEFACES and config.augment:
        # A crop that misses a stroke, or a mirror, would make another character.
        plain = create_transform(**common, crop_pct=1.0, crop_mode="squash")
        return Compose([Distort.of_strength((height, width), config.distort), plain]), evaluation
    try:
        train = create_transform(
            **common,
            is_training=True,
            no_aug=not config.augment,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            # timm would do a jitter of 0, too.
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
        )
    # The only value that timm reads rather than takes; it fails in many ways at what it cannot read.
    except Exception as error:
        if config.auto_augment is None:
            raise
        name = config.auto_augment
        raise ValueError(
            f"data.auto_augment must be a policy of timm's, as rand-m10-n2, got {name!r}: {error!r}"
        ) from error
    return train, evaluation


def normalisation(config: DataConfig, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the images of a model are normalised by, per channel.

    Raises:
        ValueError: if there are not as many values as channels, or one.
    """
    size = resolve_data_config({}, model=model)
    channels = model.patch_embed.proj.in_channels if hasattr(model, "patch_embed") else size["input_size"][0]
    normal = {"mean": (fm.MEAN,), "std": (fm.STD,)} if config.name == FASHION_MNIST else size
    return (
        _per_channel("data.mean", config.mean or normal["mean"], channels),
        _per_channel("data.std", config.std or normal["std"], channels),
    )


def _per_channel(key: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel; a grey image gets the mean of the colours' values, a colour image repeats one value."""
    if len(values) == channels:
        return tuple(values)
    if 1 not in (len(values), channels):
        raise ValueError(f"{key} must have 1 or {channels} values, one per channel, got {len(values)}")
    return (sum(values) / len(values),) * channels


def build_mixup(config: Config, num_classes: int) -> Mixup | DirichletMixup | None:
    """timm's Mixup and CutMix, the original's mixup, or None if they are off."""
    data, smoothing = config.data, config.loss.label_smoothing
    if data.mixup == 0 and data.cutmix == 0:
        return None
    if data.mixup_mode == "dirichlet":
        return DirichletMixup(data.mixup, num_classes, smoothing)
    return Mixup(data.mixup, data.cutmix, mode=data.mixup_mode, label_smoothing=smoothing, num_classes=num_classes)


def build_loss(config: Config) -> nn.Module:
    """The mean loss of a batch of logits (B, N) and of labels (B,), or of mixed targets (B, N)."""
    smoothing = config.loss.label_smoothing
    if config.loss.kind == "sigmoid":
        return BinaryCrossEntropy(smoothing=smoothing, sum_classes=True)
    if config.data.mixup > 0 or config.data.cutmix > 0:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=smoothing)
