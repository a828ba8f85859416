"""Images in one folder per class, and single image files; a broken file is named, never skipped in silence."""

from pathlib import Path

from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.utils.data import Dataset

# What PIL raises for a file that is no image, or a part of one.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class BrokenImageError(ValueError):
    """An image cannot be read; the message names it."""


def read_image(path: Path | str, mode: str = "RGB") -> Image.Image:
    """Reads and decodes an image file.

    Args:
        path: the file.
        mode: PIL mode to convert to, "RGB" or "L".

    Raises:
        BrokenImageError: if the file is missing or cannot be decoded, naming it.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise BrokenImageError(f"image {path} does not exist") from None
    except UNREADABLE as error:
        raise BrokenImageError(f"image {path} cannot be read: {error}") from None


class ImageFolder(Dataset):
    """Images below one folder per class; an item is (PIL image, label).

    Args:
        root: folder with one folder per class, found as timm finds them.
        class_names: the classes by label, where another split has set them; None takes the folders' names, sorted.
        mode: PIL mode of the items, "RGB" or "L".

    Attributes:
        samples: (path, label) of each image.
        class_names: name of each label.

    Raises:
        ValueError: if the folder is missing, holds no image, has images outside a class folder, or its classes are not
            `class_names`; on access, if an image cannot be read.
    """

    def __init__(self, root: Path | str, class_names: tuple[str, ...] | None = None, mode: str = "RGB"):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"image folder {root} does not exist")
        self.samples, classes = find_images_and_targets(str(root))
        if not self.samples:
            raise ValueError(f"image folder {root} must hold one folder of images per class, got no image")
        if "" in classes:
            loose = next(path for path, label in self.samples if label == classes[""])
            raise ValueError(f"images in {root} must lie in one folder per class, got {loose}")
        found = tuple(sorted(classes, key=classes.get))
        if class_names is not None:
            unknown = sorted(set(found) - set(class_names))
            if unknown:
                raise ValueError(f"classes in {root} must be among the training classes, got {', '.join(unknown)} too")
            self.samples = [(path, class_names.index(found[label])) for path, label in self.samples]
        self.class_names = found if class_names is None else tuple(class_names)
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, self.mode), label
