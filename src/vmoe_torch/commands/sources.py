"""What a user names on the command line, opened: a trained model, and images with labels to use it on."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from vmoe_torch.control import moe_layers
from vmoe_torch.data import FashionMnist, ImageFolder, NamedDataset, TarShards, Typefaces, described
from vmoe_torch.data.folder import class_folders
from vmoe_torch.data.glyphs import has_fonts
from vmoe_torch.data.named import NUMBERED, STREAMS, class_names_of
from vmoe_torch.data.names import shown, some
from vmoe_torch.data.shards import WDS
from vmoe_torch.data.typefaces import TYPEFACES, are_characters
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.description import description_of
from vmoe_torch.train import Config, build_transforms
from vmoe_torch.train.build import image_mode
from vmoe_torch.train.checkpoint import FORMAT, model_of, write_atomically
from vmoe_torch.weights.sources import Weights, is_weights, read_weights

MODEL_HELP = (
    "run folder or checkpoint file of vmoe train or of timm's train.py, folder of timm's save_for_hf, file with a "
    "state dict (NAME=FILE where nothing else tells the timm model), PREFIX of a checkpoint of the original, or name "
    "of a timm model with pretrained weights"
)
DATA_HELP = (
    "folder of class folders (or of splits train, val, valid, validation, test of such), folder of Fashion-MNIST's IDX "
    "files, fashion_mnist for the images that come along, a data set of timm's as torch/cifar10=FOLDER, or "
    "typefaces=FOLDER for the characters in a folder of fonts"
)


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


class Images(Dataset):
    """Labelled images of a data set; an item is (PIL image, label).

    Args:
        dataset: items (PIL image, label).
        name: what the user called it, for errors.
        mode: PIL mode of the items.
        place: what the user called it, and the split.

    Attributes:
        class_names: by label, where they are known.
    """

    def __init__(self, dataset: Dataset, name: str, mode: str, place: str | None = None):
        self.dataset = dataset
        self.name = shown(name)
        self.place = shown(place or name)
        self.mode = mode
        self.class_names = class_names_of(dataset)
        # The label of each of the data set's classes; None leaves them.
        self._labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image.convert(self.mode), self._label(label)

    def described(self) -> str:
        """Which images these are, how many, in how many classes, and what was passed over."""
        return f"{self.place}: {described(self.dataset)}"

    def _label(self, label: int) -> int:
        return int(label if self._labels is None else self._labels[label])

    def labels(self) -> np.ndarray:
        """(N,) int64, without reading the images where the data set has a list of its labels."""
        found = getattr(self.dataset, "labels", getattr(self.dataset, "targets", None))
        if found is None and hasattr(self.dataset, "samples"):
            found = [label for _, label in self.dataset.samples]
        if found is None:
            found = [label for _, label in self.dataset]
        return np.array([self._label(label) for label in found], dtype=np.int64)

    def follow(self, class_names: tuple[str, ...]) -> None:
        """Labels become those of these names, which may be more than the data set's.

        Raises:
            ValueError: if a class of the data set is not among them.
        """
        own = self.class_names
        if own == class_names:
            return
        labels = {name: label for label, name in enumerate(class_names)}
        unknown = sorted(set(own) - labels.keys())
        if unknown:
            raise ValueError(
                f"classes of {self.name} must be among the {len(class_names)} expected, got {some(unknown)} too"
            )
        if len(labels) < len(class_names):
            twice = next(name for label, name in enumerate(class_names) if labels[name] != label)
            raise ValueError(f"names of classes must tell them apart, got {shown(twice)!r} twice")
        self._labels = [labels[name] for name in own]
        self.class_names = class_names


def open_images(
    source: Source,
    data: str | Path,
    split: str | None = None,
    *,
    own_labels: bool = False,
    class_names: tuple[str, ...] | None = None,
) -> Images:
    """Opens images for a model, labelled as the model labels.

    Where both sides have names of classes, labels follow the model's; the images need not show all of its classes.

    Args:
        source: the model.
        data: "fashion_mnist" for the images that ship with the package; a folder with Fashion-MNIST's IDX files; a
            folder with one folder of images per class; or a map-style data set of timm's `create_dataset`, and where
            its files are, as "torch/cifar10=FOLDER"; WebDataset's shards are "wds/=FOLDER", the characters that the
            model knows in a folder of fonts are "typefaces=FOLDER", or FOLDER for a model that learned from fonts.
        split: None is "test" of Fashion-MNIST, the first folder there is of val, valid, validation and test inside a
            folder (the folder itself, if it has neither these nor train), and "validation" of timm's. "." is all that
            is in the folder.
        own_labels: whether to number the classes as the data set does, whatever those of the model.
        class_names: to number the classes so, whatever those of the model.

    Raises:
        ValueError: if there is no such data or split, or its classes are not the model's.
    """
    text = place = str(data)
    # As the model has seen images in training; the original does not turn them.
    exif = source.config is not None and source.config.data.exif
    named_by_timm = text.startswith((WDS, *NUMBERED, *STREAMS))
    name, _, root = text.partition("=")
    # A folder may be called so, too.
    named_fonts = name == TYPEFACES and root != ""
    if named_fonts or (_learned_from_fonts(source) and has_fonts(text)):
        known = class_names or (None if own_labels else source.class_names)
        dataset = _typefaces(source, Path(root if named_fonts else text), split, known)
        place = str(dataset.root)
    elif name == WDS:
        dataset = TarShards(root, split, None, source.mode, exif)
        place = f"{text} ({', '.join(path.name for path in dataset.shards[:2])}{', ...' * (len(dataset.shards) > 2)})"
    elif named_by_timm:
        dataset = NamedDataset(name, root, split, source.mode, exif)
        place = f"{text} ({dataset.split})"
    elif text == "fashion_mnist" or any(Path(text).glob("*-images-idx3-ubyte*")):
        split = split or "test"
        dataset = FashionMnist(split, None if text == "fashion_mnist" else text, source.mode)
        place = f"{text} ({split})"
    else:
        folder = Path(text)
        parts = class_folders(folder, split)
        dataset = ImageFolder(folder, mode=source.mode, parts=parts, exif=exif)
        place = ", ".join(str(folder / part) for part in parts) or text
    images = Images(dataset, text, source.mode, place)
    if class_names is not None and images.class_names is not None:
        images.follow(class_names)
    if own_labels or class_names is not None:
        return images
    names, own = images.class_names, source.class_names
    # Data sets of timm's number their classes in an order that is known, whatever they call them.
    if names is not None and own is not None and (set(names) <= set(own) or not named_by_timm):
        images.follow(own)
        return images
    count = getattr(source.model, "num_classes", None)
    if names is not None and count is not None and len(names) != count:
        raise ValueError(f"{shown(text)} must have as many classes as the model, {count}, got {len(names)}")
    images.class_names = own or names
    return images


def _learned_from_fonts(source: Source) -> bool:
    return source.config is not None and source.config.data.name == TYPEFACES


def _typefaces(source: Source, root: Path, split: str | None, class_names: tuple[str, ...] | None) -> Typefaces:
    """Characters in a folder of fonts, drawn as the model has seen them: those that are its classes, else its own."""
    parts = class_folders(root, split, has_fonts)
    side = source.config.data.kwargs.get("side") if _learned_from_fonts(source) else None
    size = {} if side is None else {"side": side}
    characters = class_names if class_names is not None and are_characters(class_names) else None
    return Typefaces(root, parts[0] if len(parts) == 1 else ".", characters, mode=source.mode, **size)
