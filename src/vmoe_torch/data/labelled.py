"""A data set whose labels follow another's names of classes, as those of a model."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vmoe_torch.data.named import class_names_of, described
from vmoe_torch.data.names import shown, some


class LabelledImages(Dataset):
    """Labelled images, or videos, of a data set; an item is (PIL image or `Video`, label).

    Args:
        dataset: items (PIL image, label).
        name: what the user called it, for errors.
        mode: PIL mode of the items.
        title: what the user called it, and the split.

    Attributes:
        class_names: by label, where they are known.
    """

    def __init__(self, dataset: Dataset, name: str, mode: str, title: str | None = None):
        self.dataset = dataset
        self.name = shown(name)
        self.title = shown(title or name)
        self.mode = mode
        self.class_names = class_names_of(dataset)
        # The label of each of the data set's classes; None leaves them.
        self._labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image if image.mode == self.mode else image.convert(self.mode), self._label(label)

    def described(self) -> str:
        """Which images these are, how many, in how many classes, and what was passed over."""
        return f"{self.title}: {described(self.dataset)}"

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
