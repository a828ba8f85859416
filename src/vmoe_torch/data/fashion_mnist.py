"""Fashion-MNIST (arXiv 1708.07747): 28 x 28 grey images of ten kinds of clothing.

A subset ships with the package: the first 900 training and the first 200 test images of each class, in the order of the
original files. `root` may name a folder with the full IDX files instead. The images are MIT-licensed (LICENSE beside
them).
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vmoe_torch.data.idx import read_idx, write_idx

CLASS_NAMES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN, STD = 0.2860, 0.3530
IMAGES_PER_CLASS = {"train": 900, "test": 200}
SHIPPED = Path(__file__).parent / "fashion_mnist"
_PREFIX = {"train": "train", "test": "t10k"}


class FashionMnist(Dataset):
    """Images and labels in memory; an item is (PIL image of mode "L", label).

    Args:
        split: "train" or "test".
        root: folder with the full IDX files; None is the subset that ships with the package.
        mode: PIL mode of the items, "L" or "RGB".

    Attributes:
        split: "train" or "test".
        images: (N, 28, 28) uint8.
        labels: (N,) int64.
        class_names: the ten names.
    """

    def __init__(self, split: str = "train", root: Path | str | None = None, mode: str = "L"):
        self.split = split
        self.images, labels = _read_split(split, SHIPPED if root is None else Path(root))
        self.labels = labels.astype(np.int64)
        self.class_names = CLASS_NAMES
        self.mode = mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        return (image if self.mode == "L" else image.convert(self.mode)), int(self.labels[index])

    def digest(self) -> str:
        """Of the images and labels."""
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def _read_split(split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) images and (N,) labels, uint8 both."""
    if split not in _PREFIX:
        raise ValueError(f"split must be one of {tuple(_PREFIX)}, got {split!r}")
    images = read_idx(_find(root, f"{_PREFIX[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(root, f"{_PREFIX[split]}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"images and labels in {root} must agree, got shapes {images.shape} and {labels.shape}")
    if len(labels) == 0 or labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"labels in {root} must be in 0..{len(CLASS_NAMES) - 1} and at least one, got {len(labels)}")
    return images, labels


def _find(root: Path, name: str) -> Path:
    for path in (root / f"{name}.gz", root / name):
        if path.is_file():
            return path
    raise ValueError(f"{root} must hold {name}.gz or {name}, got neither")


def write_subset(source: Path | str, target: Path | str) -> None:
    """Writes the subset that ships with the package: the first images of each class, in the original order.

    Args:
        source: folder with the full IDX files.
        target: folder to write to.
    """
    for split, count in IMAGES_PER_CLASS.items():
        images, labels = _read_split(split, Path(source))
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(CLASS_NAMES))]))
        write_idx(Path(target) / f"{_PREFIX[split]}-images-idx3-ubyte.gz", images[chosen])
        write_idx(Path(target) / f"{_PREFIX[split]}-labels-idx1-ubyte.gz", labels[chosen])
