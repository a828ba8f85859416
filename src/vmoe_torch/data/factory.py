"""The one place that says what a name or a folder of images means: for training, the commands, the demo, benchmarks.

| name | root | split by default |
| --- | --- | --- |
| folder | holds a folder per split, which holds a folder per class; or the folders of classes | one to measure on |
| video | the same, of videos | one to measure on |
| fashion_mnist | holds the IDX files; None is the subset that ships with the package | test |
| typefaces | holds a folder of fonts per split; or the fonts | one to measure on |
| wds/ | holds WebDataset's shards | one to measure on |
| torch/NAME, hfds/NAME | where timm's `create_dataset` finds the files | validation |
"""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vmoe_torch.data.fashion_mnist import FashionMnist
from vmoe_torch.data.folder import EVALUATION, TRAIN, ImageFolder, class_folders
from vmoe_torch.data.glyphs import has_fonts
from vmoe_torch.data.named import NUMBERED, STREAMS, NamedDataset
from vmoe_torch.data.shards import WDS, TarShards
from vmoe_torch.data.typefaces import TYPEFACES, Typefaces
from vmoe_torch.data.video import VIDEO
from vmoe_torch.data.video_folder import VideoFolder

FOLDER, FASHION_MNIST = "folder", "fashion_mnist"


def named_data(text: str) -> tuple[str, str | None]:
    """Name and root of data that are written as one word: a folder, "fashion_mnist" or "torch/cifar10=FOLDER"."""
    name, _, root = text.partition("=")
    # A folder may be called typefaces or video, too.
    if name.startswith((WDS, *NUMBERED, *STREAMS)) or (name in (TYPEFACES, VIDEO) and root):
        return name, root
    if text == FASHION_MNIST:
        return FASHION_MNIST, None
    return (FASHION_MNIST if any(Path(text).glob("*-images-idx3-ubyte*")) else FOLDER), text


def open_data(
    name: str,
    root: Path | str | None = None,
    split: str | None = None,
    *,
    mode: str = "RGB",
    exif: bool = False,
    class_names: tuple[str, ...] | None = None,
    **arguments: Any,
) -> Dataset:
    """Opens a split of a data set; an item is (PIL image, label), or (`Video`, label).

    Args:
        name: "folder", "video", "fashion_mnist", "typefaces", "wds/", or a data set of timm's that numbers its images.
        root: folder of its files.
        split: whatever the case, "val", "valid" and "validation" mean the same, as "train" and "training"; hfds/ has
            names of its own. "." is all that is in the folder.
        mode: PIL mode of the items, "RGB" or "L".
        exif: whether to turn images as their EXIF orientation says.
        class_names: by label, where another split has set them; a data set of timm's has its own.
        **arguments: of `Typefaces`.

    Raises:
        ValueError: if there is no such data set or split, or it cannot be used.
    """
    if name == FASHION_MNIST:
        if split is None or split.lower() in EVALUATION:
            split = "test"
        elif split.lower() in TRAIN:
            split = "train"
        return FashionMnist(split, root, mode)
    if name == WDS:
        return TarShards(root, split, class_names, mode, exif)
    if "/" in name:
        return NamedDataset(name, root, split, mode, exif)
    root = Path(root)
    if name == TYPEFACES:
        parts = class_folders(root, split, has_fonts, "folder of fonts")
        arguments["characters"] = class_names or arguments.get("characters")
        return Typefaces(root, parts[0] if len(parts) == 1 else ".", mode=mode, **arguments)
    kind = VideoFolder if name == VIDEO else ImageFolder
    parts = class_folders(root, split, kind=f"{kind.kind} folder")
    if len(parts) == 1:
        root, parts = root / parts[0], []
    return kind(root, class_names, mode, parts=parts, exif=exif)
