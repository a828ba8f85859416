"""A trained model that a user names on the command line, opened."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn

from vmoe_torch.control import moe_layers
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.description import description_of
from vmoe_torch.train import Config, build_transforms
from vmoe_torch.train.build import image_mode
from vmoe_torch.train.checkpoint import FORMAT, model_of, write_atomically
from vmoe_torch.weights.sources import Weights, is_weights, read_weights


@dataclass(frozen=True)
class Source:
    """A model to use."""

    model: nn.Module
    """The model in eval mode, on the device."""
    transform: Callable[[Image.Image], Tensor]
    """Transform for evaluation, PIL image -> (C, H, W) float32."""
    mode: str
    """PIL mode of the images that it takes, "RGB" or "L"."""
    class_names: tuple[str, ...] | None
    """Names of the classes by label, where they are known; those of ImageNet are WordNet's numbers ("n01440764")."""
    config: Config | None
    """Configuration of the run that trained it, for a model of `vmoe train`."""
    about: str = ""
    """In a few words, which weights were taken and what told the model."""


def open_model(name: str | Path, device: str | torch.device = "cpu", *, average: bool | None = None) -> Source:
    """Opens a trained model, with the routing that was chosen for it where its file says it.

    Args:
        name: what `vmoe_torch.checkpoints.read_weights` reads, as a run folder (its best checkpoint) or checkpoint file
            of `vmoe train` or of timm's train.py, or the prefix of a checkpoint of the original, which has the routing
            that `VMoE` has by default; or a timm model's name, with or without tag, that has pretrained weights.
        device: where to put the model.
        average: whether to take the moving average of the weights; None takes it where there is one.

    Raises:
        ValueError: if it is none of these, cannot be read or fetched, has no moving average where one is wanted, or
            there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu on a machine without CUDA, got {device}")
    text = str(name)
    config = class_names = None
    data, about, averaged = {}, text, False
    if is_weights(text) or not timm.is_model(text):
        weights = _read(text, average is not False)
        if weights.run is not None:
            model, config, class_names = model_of(weights.run, average is not False)
            told = "vmoe train's configuration"
        else:
            model, told = open_weights(weights)
            class_names = None if weights.hub is None else weights.hub.class_names
            data = {} if weights.timm is None else weights.timm.args
        averaged = weights.average
        about = f"{weights.source}: {told}{', moving average of the weights' if weights.average else ''}"
    else:
        model = _pretrained(text)
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
    return Source(model.to(device).eval(), transform, mode, class_names, config, about)


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


def _read(name: str, average: bool) -> Weights:
    if not is_weights(name):
        raise ValueError(f"model must be a run folder, a checkpoint file or a timm model's name, got {name!r}")
    return read_weights(name, average=average)


def _pretrained(name: str) -> nn.Module:
    """A timm model with its pretrained weights."""
    if not timm.is_model_pretrained(name):
        raise ValueError(f"model must have pretrained weights to be used by its name, got {name!r}")
    try:
        return timm.create_model(name, pretrained=True)
    # What downloads raise depends on the library that timm uses.
    except Exception as error:
        raise ValueError(f"weights of {name} cannot be had: {error}") from error
