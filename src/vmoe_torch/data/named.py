"""Data sets of timm's `create_dataset` by name, as "torch/cifar10" or "hfds/food101", whose images have numbers."""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from vmoe_torch.data.folder import EVALUATION, TRAIN, ImageFolder, class_folders
from vmoe_torch.data.image import UNREADABLE, broken, converted
from vmoe_torch.data.names import shown

NUMBERED = ("torch/", "hfds/")
STREAMS = ("tfds/", "hfids/")
# torchvision's classes of a folder of images: our rules of what counts, its order of the classes.
FOLDERS = ("torch/image_folder", "torch/folder")


class NamedDataset(Dataset):
    """Images and labels; an item is (PIL image, label).

    Args:
        name: as timm takes it, "torch/NAME" for torchvision's or "hfds/NAME" for Hugging Face's.
        root: folder of its files.
        split: as the data set calls it; torchvision's know "train" and "val", whatever the case. None is "validation",
            or the folder that holds one.
        mode: PIL mode of the items, "RGB" or "L".
        exif: whether to turn images as their EXIF orientation says.

    Attributes:
        dataset: timm's or torchvision's.
        split: that was opened.
        class_names: by label, where the data set tells them.
        labels: of all images, where it tells them without reading images.

    Raises:
        ValueError: if it cannot be opened, or is a stream (tfds, hfids): its images come in an order of its own,
            so a stopped run could not go on exactly. On access, BrokenImageError if an image cannot be read.
    """

    def __init__(
        self, name: str, root: Path | str | None, split: str | None = None, mode: str = "RGB", exif: bool = False
    ):
        if not name.startswith(NUMBERED):
            kinds = " or ".join(f"{prefix}NAME" for prefix in NUMBERED)
            raise ValueError(f"data set must be one whose images have numbers, {kinds}, got {name}")
        self.dataset = self._opened(name, root, split, mode, exif)
        self.name = name
        self.split = ", ".join(self.dataset.parts) if isinstance(self.dataset, ImageFolder) else split or "validation"
        self.mode = mode
        self.exif = exif
        self.class_names = class_names_of(self.dataset)
        self.labels = getattr(self.dataset, "targets", None)
        if isinstance(self.dataset, ImageFolder):
            self.labels = [label for _, label in self.dataset.samples]
        self.notices = getattr(self.dataset, "notices", [])

    @staticmethod
    def _opened(name: str, root: Path | str | None, split: str | None, mode: str, exif: bool) -> Dataset:
        if name in FOLDERS and root is not None:
            parts = class_folders(Path(root), split)
            return ImageFolder(root, mode=mode, parts=parts, exif=exif, order=str)
        # "Train" would be timm's word for the images to measure on.
        if name.startswith("torch/") and split is not None and split.lower() in (*TRAIN, *EVALUATION):
            split = split.lower()
        try:
            return create_dataset(
                name, root=None if root is None else str(root), split=split or "validation", input_img_mode=mode
            )
        # Every library behind timm has errors of its own.
        except Exception as error:
            raise ValueError(
                f"data set {name} in {shown(root)} cannot be opened: {shown(error) or type(error).__name__}"
            ) from error

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self.dataset, ImageFolder):
            return self.dataset[index]
        # An index too high ends a loop over the images, and is no broken image.
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        try:
            if isinstance(self.dataset, ImageDataset):
                # The data set itself would take the next image for a broken one, and say so to nobody.
                file, label, *_ = self.dataset.reader[index]
                with closing(file), Image.open(file) as image:
                    return converted(image, self.mode, self.exif), int(label)
            image, label = self.dataset[index]
            return converted(image, self.mode, self.exif), int(label)
        except UNREADABLE as error:
            raise broken(shown(self._file(index)), error) from None

    def digest(self) -> str:
        """Of the list of images as far as the data set tells it without reading them, and of labels and classes."""
        if isinstance(self.dataset, ImageFolder):
            return self.dataset.digest()
        text = "\0".join([str(len(self)), *(self.class_names or ())])
        digest = hashlib.sha256(text.encode(errors="surrogateescape"))
        if self.labels is not None:
            digest.update("\0".join(map(str, np.asarray(self.labels).tolist())).encode())
        return digest.hexdigest()

    def _file(self, index: int) -> str:
        """The file of an image, or its number."""
        if hasattr(self.dataset, "samples"):
            return str(self.dataset.samples[index][0])
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index))
        return f"{index} of {self.name}"


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """The names of a data set's classes by label, where it tells them."""
    names = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
    if names is None and hasattr(dataset, "reader"):
        by_name = getattr(dataset.reader, "class_to_idx", None) or {}
        names = sorted(by_name, key=by_name.get)
    return tuple(map(str, names)) if names else None


def described(dataset: Any) -> str:
    """How many images and classes a data set has, and what of it was passed over: "48 images in 3 classes"."""
    names = class_names_of(dataset)
    text = f"{len(dataset):,} {getattr(dataset, 'kind', 'image')}s" + (
        "" if names is None else f" in {len(names):,} classes"
    )
    return "; ".join([text, *getattr(dataset, "notices", ())])
