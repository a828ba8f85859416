"""WebDataset's shards, tar files of images and labels, read at any place: "wds/" as timm names them.

A stream has no order that a stopped run could take up again. So the shards' headers are read once, at the start, and an
image is read where it lies: the order, resuming and broken images are then those of every other data set. That takes
shards on a disk that is fast at random reads.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vmoe_torch.data.folder import UNREADABLE, BrokenImageError
from vmoe_torch.data.tar import tar_files

WDS = "wds/"
IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
# What a folder may hold beside its shards: timm's description of splits, and the classes' names, one a line.
INFOS = ("_info.json", "info.json")
CLASS_NAMES = "classnames.txt"
# All before the first dot of a file's name is the sample's, the rest says what it is.
_NAMED = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


class TarShards(Dataset):
    """Images in WebDataset's shards, each with its label in a .cls file; an item is (PIL image, label).

    Args:
        root: folder of the shards.
        split: as timm takes it, names of shards, as "train-{0000..0127}.tar", or a split of _info.json; or a word in
            the names of the shards, as "train" in "cars-train-0000.tar"; or a folder of shards in root.
        class_names: the classes by label, where another split has set them; None takes those of classnames.txt, or
            numbers.
        mode: PIL mode of the items, "RGB" or "L".

    Attributes:
        labels: (N,) int64.
        class_names: name of each label.

    Raises:
        ValueError: if there is no such split, a shard is missing or no whole tar file, a sample has no image or no
            label, or a label no class. On access, BrokenImageError if an image cannot be read.
    """

    def __init__(self, root: Path | str, split: str, class_names: tuple[str, ...] | None = None, mode: str = "RGB"):
        root = Path(root)
        self.shards = find_shards(root, split)
        samples = [(number, *sample) for number, shard in enumerate(self.shards) for sample in _samples(shard)]
        if not samples:
            raise ValueError(f"shards must hold images ({', '.join(IMAGES)}), got none in {self.shards[0]}")
        # Arrays, since processes that load would each make copies of Python's numbers and strings.
        numbers, names, offsets, sizes, labels = zip(*samples)
        self._shard, self._offset, self._size = (np.array(values, np.int64) for values in (numbers, offsets, sizes))
        self._name = np.array([name.encode() for name in names])
        self.labels = np.array(labels, np.int64)
        if class_names is None:
            file = root / CLASS_NAMES
            most = int(self.labels.max()) + 1
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else map(str, range(most))
            class_names = tuple(lines)
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(class_names)))
        if len(wrong):
            raise ValueError(
                f"label of {self._where(wrong[0])} must be in 0..{len(class_names) - 1}, got {self.labels[wrong[0]]}"
            )
        self.class_names = tuple(class_names)
        self.mode = mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            # Opened anew: there may be more shards than a process may have open, and processes would share a position.
            with open(self.shards[self._shard[index]], "rb") as file:
                file.seek(self._offset[index])
                data = file.read(self._size[index])
            with Image.open(io.BytesIO(data)) as image:
                return image.convert(self.mode), int(self.labels[index])
        except UNREADABLE as error:
            raise BrokenImageError(f"image {self._where(index)} cannot be read: {error}") from None

    def _where(self, index: int) -> str:
        return f"{self._name[index].decode()} in {self.shards[self._shard[index]]}"


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split, in order.

    Raises:
        ValueError: if there are none, or one is missing.
    """
    if not root.is_dir():
        raise ValueError(f"folder of shards {root} does not exist")
    known = {}
    for info in (root / name for name in INFOS):
        if info.is_file():
            known = json.loads(info.read_text(encoding="utf-8")).get("splits", {})
            break
    if split.endswith(".tar"):
        shards = [root / name for name in _expanded(split)]
    elif split in known:
        shards = [root / name for name in known[split]["filenames"]]
    elif (root / split).is_dir():
        shards = sorted((root / split).glob("*.tar"))
    else:
        shards = [path for path in sorted(root.glob("*.tar")) if split in re.split(r"[\W_]+", path.stem)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"shard {missing[0]} does not exist")
    if not shards:
        raise ValueError(f"split must name shards (.tar) in {root}, got {split!r}")
    return shards


def _expanded(names: str) -> list[str]:
    """ "a-{08..11}.tar" as a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", names)
    if found is None:
        return [names]
    before, after, width = names[: found.start()], names[found.end() :], len(found[1])
    return [
        name
        for number in range(int(found[1]), int(found[2]) + 1)
        for name in _expanded(f"{before}{number:0{width}d}{after}")
    ]


def _samples(shard: Path) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset and bytes of the image, label) of each sample: of the files in a row that are named alike."""
    key, image, label = None, None, None
    for name, offset, content in tar_files(shard):
        named = _NAMED.fullmatch(name)
        if named is None:
            continue
        if named[1] != key:
            yield from _whole(shard, key, image, label)
            key, image, label = named[1], None, None
        if named[2].lower() in IMAGES:
            image = (name, offset, len(content))
        elif named[2].lower() == LABEL:
            label = bytes(content)
    yield from _whole(shard, key, image, label)


def _whole(shard: Path, key: str | None, image: tuple | None, label: bytes | None) -> Iterator[tuple]:
    """The sample; none before the first file."""
    if key is None:
        return
    if image is None:
        raise ValueError(f"sample {key} in {shard} must have an image ({', '.join(IMAGES)}), got none")
    if label is None or not re.fullmatch(rb"\s*-?\d+\s*", label):
        got = "none" if label is None else repr(label[:20])
        raise ValueError(f"sample {key} in {shard} must have a number in its .{LABEL} file, got {got}")
    yield (*image, int(label))
