"""Data sets of timm's `create_dataset` by name, as "torch/cifar10" or "hfds/food101", whose images have numbers."""

from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from vmoe_torch.data.folder import UNREADABLE, BrokenImageError

NUMBERED = ("torch/", "hfds/")
STREAMS = ("tfds/", "hfids/")


class NamedDataset(Dataset):
    """Images and labels; an item is (PIL image, label).

    Args:
        name: as timm takes it, "torch/NAME" for torchvision's or "hfds/NAME" for Hugging Face's.
        root: folder of its files.
        split: as the data set calls it; timm knows "train" and "val" for torchvision's.
        mode: PIL mode of the items, "RGB" or "L".

    Attributes:
        dataset: timm's or torchvision's.
        class_names: by label, where the data set tells them.
        labels: of all images, where it tells them without reading images.

    Raises:
        ValueError: if it cannot be opened, or is a stream (tfds, hfids): its images come in an order of its own,
            so a stopped run could not go on exactly. On access, BrokenImageError if an image cannot be read.
    """

    def __init__(self, name: str, root: Path | str | None, split: str, mode: str = "RGB"):
        if not name.startswith(NUMBERED):
            kinds = " or ".join(f"{prefix}NAME" for prefix in NUMBERED)
            raise ValueError(f"data set must be one whose images have numbers, {kinds}, got {name}")
        try:
            self.dataset = create_dataset(
                name, root=None if root is None else str(root), split=split, input_img_mode=mode
            )
        # Every library behind timm has errors of its own.
        except Exception as error:
            raise ValueError(f"data set {name} in {root} cannot be opened: {error or type(error).__name__}") from error
        self.name = name
        self.mode = mode
        self.class_names = class_names_of(self.dataset)
        self.labels = getattr(self.dataset, "targets", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            if isinstance(self.dataset, ImageDataset):
                # The data set itself would take the next image for a broken one, and say so to nobody.
                file, label, *_ = self.dataset.reader[index]
                with closing(file), Image.open(file) as image:
                    return image.convert(self.mode), int(label)
            image, label = self.dataset[index]
            return image.convert(self.mode), int(label)
        except UNREADABLE as error:
            raise BrokenImageError(f"image {self._file(index)} cannot be read: {error}") from None

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
