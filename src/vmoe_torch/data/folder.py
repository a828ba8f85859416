"""Images in one folder per class, and the folders of splits: what counts is decided here, and said, never guessed."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from vmoe_torch.data.image import image_suffixes, read_image
from vmoe_torch.data.names import natural_key, shown, some
from vmoe_torch.data.scanning import scan, subfolders

# What splits are called, whatever the case; names in a row mean the same split.
TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation"), ("test",)
# Where images to measure on are looked for, the first one there counts.
EVALUATION = (*VAL, *TEST)


class ImageFolder(Dataset):
    """Images below one folder per class; an item is (PIL image, label).

    The first folder below the root is the class, all below it belongs to it. Every file counts whose ending is that of
    an image that Pillow decodes; others are counted in `notices`. Hidden files and folders, and those that systems
    leave (as @eaDir, __MACOSX), are passed over. Links are followed, but every folder is read once. A class folder
    without an image is a class.

    Args:
        root: folder with one folder per class.
        class_names: the classes by label, where another split has set them; None takes the folders' names, sorted.
        mode: PIL mode of the items, "RGB" or "L".
        parts: folders in root which have the class folders, instead of root itself.
        exif: whether to turn images as their EXIF orientation says.
        order: key that sorts the names of classes; the default has numbers by their value, as timm.

    Attributes:
        samples: (path, label) of each image.
        class_names: name of each label.
        parts: the folders in root that were read, "." for root itself.
        empty: names of class folders without an image.
        notices: what was passed over.
        kind: what errors and notices call an item.

    Raises:
        ValueError: if the folder is missing or cannot be read, holds no image, has images outside a class folder, or
            its classes are not `class_names`; on access, if an image cannot be read.
    """

    kind = "image"

    def __init__(
        self,
        root: Path | str,
        class_names: tuple[str, ...] | None = None,
        mode: str = "RGB",
        *,
        parts: Iterable[str] = (),
        exif: bool = False,
        order: Callable = natural_key,
    ):
        self.root = Path(root)
        self.parts = tuple(parts) or (".",)
        roots = [self.root / part for part in self.parts]
        for folder in roots:
            if not folder.is_dir():
                raise ValueError(f"{self.kind} folder {shown(folder)} does not exist{_beside(folder)}")
        found = scan(roots, self.kind, self.suffixes())
        if found.loose is not None:
            raise ValueError(
                f"{self.kind}s in {shown(root)} must lie in one folder per class, got {shown(found.loose)} outside of "
                "them"
            )
        self.notices = found.notices()
        if not found.images:
            passed = "".join(f"; {notice}" for notice in self.notices)
            raise ValueError(
                f"{self.kind} folder {shown(root)} must hold one folder of {self.kind}s per class, "
                f"got no {self.kind}{passed}"
            )
        present = {name for _, name in found.images}
        self.empty = sorted(found.classes - present, key=order)
        if self.empty:
            count = f"{len(self.empty):,} of {len(found.classes):,} class folders"
            self.notices.append(f"no {self.kind} in {count}: {some(self.empty)}")
        if class_names is None:
            class_names = tuple(sorted(found.classes, key=order))
        labels = {name: label for label, name in enumerate(class_names)}
        unknown = sorted(present - labels.keys(), key=order)
        if unknown:
            raise ValueError(f"classes in {shown(root)} must be among the training classes, got {some(unknown)} too")
        self.samples = [(path, labels[name]) for path, name in found.images]
        self.class_names = tuple(class_names)
        self.mode = mode
        self.exif = exif

    @staticmethod
    def suffixes() -> frozenset[str]:
        """The endings, in small letters, of the files that count."""
        return image_suffixes()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, self.mode, self.exif), label

    def digest(self) -> str:
        """Of the list of images, by their paths below the root, and of their labels and classes."""
        digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
        begin = len(str(self.root)) + 1
        for path, label in self.samples:
            digest.update(f"\n{path[begin:]}\0{label}".encode(errors="surrogateescape"))
        return digest.hexdigest()


def spellings(split: str) -> tuple[str, ...]:
    """The names in small letters that mean the same split, whatever its case."""
    name = split.lower()
    return next((names for names in (TRAIN, VAL, TEST) if name in names), (name,))


def find_split(root: Path, split: str) -> str | None:
    """The folder of a split in a folder: the name itself, else one that means the same, as "valid" for "val"."""
    if (root / split).is_dir():
        return split
    if not root.is_dir():
        return None
    return _first(subfolders(root), spellings(split))


def class_folders(
    root: Path,
    split: str | None = None,
    is_split: Callable[[Path], bool] = lambda folder: bool(subfolders(folder)),
    kind: str = "image folder",
) -> list[str]:
    """The folders in a folder that hold the class folders of a split, none where the folder does by itself.

    Args:
        root: folder of images.
        split: its name; None is val, valid, validation or test, the first one there, or the folder itself where no
            folder in it is one of these or train. "." is all that is in the folder, in splits or not.
        is_split: whether a folder with the name of a split can be one.
        kind: what errors call a folder.

    Raises:
        ValueError: if there is no such split, telling what is there.
    """
    wanted = root / (split or ".")
    if not root.is_dir():
        raise ValueError(f"{kind} {shown(wanted)} does not exist{_beside(wanted)}")
    if split is not None and split != ".":
        found = find_split(root, split)
        if found is None:
            rule = f"split must be a folder in {shown(root)}, got {shown(split)!r}"
            raise ValueError(f"{kind} {shown(wanted)} does not exist; {rule}; {_holds(root)}")
        return [found]
    there = subfolders(root)
    splits = [name for name in there if name.lower() in (*TRAIN, *EVALUATION)]
    # A class may be called "train", too; what it holds are images, not folders.
    if not any(is_split(root / name) for name in splits):
        return []
    if split == ".":
        return there
    found = _first(there, EVALUATION)
    if found is None:
        raise ValueError(
            f"images to measure on must be in a folder {', '.join(EVALUATION)} in {shown(root)}, or in a split that is "
            f"named; {_holds(root)}"
        )
    return [found]


def _first(there: list[str], names: tuple[str, ...]) -> str | None:
    """The folder that has the first of these names that any has, whatever the case."""
    by_name = {name.lower(): name for name in reversed(there)}
    return next((by_name[name] for name in names if name in by_name), None)


def _holds(folder: Path) -> str:
    there = subfolders(folder)
    return f"it holds {some(there)}" if there else "it holds no folder"


def _beside(folder: Path) -> str:
    """What the folder around a missing one holds, for an error."""
    parent = folder.parent
    return f"; {shown(parent)} holds {some(subfolders(parent))}" if parent.is_dir() and subfolders(parent) else ""
