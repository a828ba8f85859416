"""A trained model that a user names on the command line, opened."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn

from vmoe_torch.control import moe_layers
from vmoe_torch.data import ClipTiming, ClipTransform
from vmoe_torch.layers.choice import description_of
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.train import Config, build_transforms
from vmoe_torch.train.build import image_mode
from vmoe_torch.train.checkpoint import FORMAT, model_of, write_atomically
from vmoe_torch.train.device import chosen_device
from vmoe_torch.weights.sources import is_weights, pretrained_model, read_weights


@dataclass(frozen=True)
class Source:
    """A model to use."""

    model: nn.Module
    """The model in eval mode, on the device."""
    transform: Callable[[Any], Tensor]
    """Transform for evaluation, PIL image -> (C, H, W) float32; a `ClipTransform` for a model of videos."""
    mode: str
    """PIL mode of the images that it takes, "RGB" or "L"."""
    class_names: tuple[str, ...] | None
    """Names of the classes by label, where they are known; those of ImageNet are WordNet's numbers ("n01440764")."""
    config: Config | None
    """Configuration of the run that trained it, for a model of `vmoe train`."""
    about: str = ""
    """In a few words, which weights were taken and what told the model."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def open_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    *,
    average: bool | None = None,
    views: tuple[int, int] | None = None,
) -> Source:
    """Opens a trained model, with the routing that was chosen for it where its file says it.

    Args:
        name: what `vmoe_torch.checkpoints.read_weights` reads; a checkpoint of the original has the routing that `VMoE`
            has by default.
        device: where to put the model: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        average: whether to take the moving average of the weights; None takes it where there is one.
        views: clips, and crops of each, of a video; None is one clip in the middle, cropped there.

    Raises:
        ValueError: if it is none of these, cannot be read or fetched, has no moving average where one is wanted, or
            there is no such device; if views are wanted of a model that takes no videos.
    """
    place = chosen_device("--device", str(device))
    text = str(name)
    config = class_names = None
    data, about, averaged = {}, text, False
    if is_weights(text) or not timm.is_model(text):
        weights = read_weights(text, average=average is not False, progress=sys.stderr.isatty())
        if weights.run is not None:
            model, config, class_names = model_of(weights.run, weights.state)
            told = "vmoe train's configuration"
        else:
            model, told = open_weights(weights)
            class_names = None if weights.hub is None else weights.hub.class_names
            data = {} if weights.timm is None else weights.timm.args
        averaged = weights.average
        about = f"{weights.source}: {told}{', moving average of the weights' if weights.average else ''}"
    else:
        model = pretrained_model(text)
        subset = infer_imagenet_subset(model)
        if subset is not None:
            info = ImageNetInfo(subset)
            class_names = tuple(info.index_to_label_name(label) for label in range(info.num_classes()))
    if average and not averaged:
        raise ValueError(f"{text} must hold a moving average of the weights for --weights average, got none")
    if chosen := described_routing(model):
        about += f"\nrouting chosen for these weights: {chosen}"
    # A run's own configuration is what its user knows already.
    if chosen or (config is None and about != text):
        print(about, file=sys.stderr)
    if hasattr(model, "ensemble_output"):
        # Their exponentials are the members' mean, so softmax and cross-entropy do what they do for logits.
        model.ensemble_output = "log_probabilities"
    if config is not None:
        transform, mode = build_transforms(config.data, model)[1], image_mode(config.model)
    else:
        cfg = resolve_data_config({k: v for k, v in data.items() if v not in (None, "")}, model=model)
        if hasattr(model, "patch_embed"):
            # timm tells what the weights were made for, not what the model was built for.
            size = model.patch_embed.img_size or cfg["input_size"][1:]
            cfg["input_size"] = (model.patch_embed.proj.in_channels, *size)
        channels = cfg["input_size"][0]
        if channels == 1:
            cfg |= {key: (sum(cfg[key]) / len(cfg[key]),) for key in ("mean", "std")}
        transform, mode = create_transform(**cfg), "L" if channels == 1 else "RGB"
        if hasattr(model, "num_frames"):
            transform = ClipTransform(transform, ClipTiming.of(model))
    if views is not None:
        if not isinstance(transform, ClipTransform):
            raise ValueError(f"--views needs a model of videos, got {text}")
        transform = transform.views(*views)
    return Source(model.to(place).eval(), transform, mode, class_names, config, about)


def save_source(source: Source, path: str | Path) -> None:
    """Writes a model as it is set now, to be opened by `open_model`: a checkpoint of `vmoe train` where it is of a run,
    else a state dict, which says what it is of.

    Raises:
        OSError: if it cannot be written.
        ValueError: if nothing would say what the model is.
    """
    weights = source.model.state_dict()
    if source.config is None:
        if description_of(weights) is None:
            kind = type(source.model).__name__
            raise ValueError(f"the model to save must be of a run or made by a timm name of this package, got {kind}")
        write_atomically(Path(path), weights)
        return
    run = {"format": FORMAT, "config": source.config.to_dict(), "class_names": list(source.class_names)}
    write_atomically(Path(path), {**run, "model": weights, "ema": None})


def described_routing(model: nn.Module) -> str:
    """The routing that was chosen after a model was made, by layer; "" if none was."""
    chosen = {name: layer.chosen_routing() for name, layer in moe_layers(model).items()}
    return "; ".join(
        f"{name} {', '.join(f'{key}={value}' for key, value in values.items())}"
        for name, values in chosen.items()
        if values
    )
