"""WebDataset's shards, tar files of images and labels, read at any place: "wds/" as timm names them.

A stream has no order that a stopped run could take up again. So the shards' headers are read once, at the start, and an
image is read where it lies: the order, resuming and broken images are then those of every other data set. That takes
shards on a disk that is fast at random reads.
"""

import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vmoe_torch.data.folder import EVALUATION, spellings
from vmoe_torch.data.image import UNREADABLE, broken, converted, image_suffixes
from vmoe_torch.data.names import shown, some
from vmoe_torch.data.scanning import is_hidden, subfolders
from vmoe_torch.data.tar import tar_files

WDS = "wds/"
# The usual ones; all others that Pillow decodes count, too.
IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
# What a folder may hold beside its shards: timm's description of splits, and the classes' names, one a line.
INFOS = ("_info.json", "info.json")
CLASS_NAMES = "classnames.txt"
# Classes without names, at most: a label beyond is a mistake.
MOST_CLASSES = 2**20
# All before the first dot of a file's name is the sample's, the rest says what it is.
_NAMED = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
# Of so many digits that it fits 64 bits.
_LABEL = re.compile(rb"\s*(-?\d{1,18})\s*")


class TarShards(Dataset):
    """Images in WebDataset's shards, each with its label in a .cls file; an item is (PIL image, label).

    Args:
        root: folder of the shards.
        split: as timm takes it, names of shards, as "train-{0000..0127}.tar", or a split of _info.json; or a word in
            the names of the shards, as "train" in "cars-train-0000.tar"; or a folder of shards in root. Whatever the
            case, "val", "valid" and "validation" mean the same, as "train" and "training"; None is one of the first
            three or "test", the first one there.
        class_names: the classes by label, where another split has set them; None takes those of classnames.txt, or
            numbers.
        mode: PIL mode of the items, "RGB" or "L".
        exif: whether to turn images as their EXIF orientation says.

    Attributes:
        labels: (N,) int64.
        class_names: name of each label.

    Raises:
        ValueError: if there is no such split, a shard is missing or no whole tar file, a sample has not one image and
            one label, comes twice in a shard, or is a link, or a label is no class. On access, BrokenImageError if an
            image cannot be read.
    """

    def __init__(
        self,
        root: Path | str,
        split: str | None,
        class_names: tuple[str, ...] | None = None,
        mode: str = "RGB",
        exif: bool = False,
    ):
        root = Path(root)
        self.shards = find_shards(root, split)
        samples = [(number, *sample) for number, shard in enumerate(self.shards) for sample in _samples(shard)]
        if not samples:
            raise ValueError(f"shards must hold images ({', '.join(IMAGES)}), got none in {shown(self.shards[0])}")
        # Arrays, since processes that load would each make copies of Python's numbers and strings.
        numbers, names, offsets, sizes, labels = zip(*samples)
        self._shard, self._offset, self._size = (np.array(values, np.int64) for values in (numbers, offsets, sizes))
        self._name = np.array([name.encode(errors="surrogateescape") for name in names])
        self.labels = np.array(labels, np.int64)
        file = root / CLASS_NAMES
        if class_names is None and file.is_file():
            class_names = _class_names(file)
        most = MOST_CLASSES if class_names is None else len(class_names)
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= most))
        if len(wrong):
            raise ValueError(f"label of {self._where(wrong[0])} must be in 0..{most - 1}, got {self.labels[wrong[0]]}")
        if class_names is None:
            class_names = map(str, range(int(self.labels.max()) + 1))
        self.class_names = tuple(class_names)
        self.mode = mode
        self.exif = exif

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        shard, offset, size = self.shards[self._shard[index]], self._offset[index], self._size[index]
        try:
            # Opened anew: there may be more shards than a process may have open, and processes would share a position.
            with open(shard, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            with Image.open(io.BytesIO(data)) as image:
                return converted(image, self.mode, self.exif), int(self.labels[index])
        except UNREADABLE as error:
            raise broken(self._where(index), error) from None

    def digest(self) -> str:
        """Of the list of images, by their names, places and sizes, and of their labels and classes."""
        digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
        for shard in self.shards:
            digest.update(f"\n{shard.name}".encode(errors="surrogateescape"))
        for array in (self._shard, self._name, self._offset, self._size, self.labels):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _where(self, index: int) -> str:
        name = self._name[index].decode(errors="surrogateescape")
        return f"{shown(name)} in {shown(self.shards[self._shard[index]])}"


def find_shards(root: Path, split: str | None) -> list[Path]:
    """The shards of a split, in order.

    Raises:
        ValueError: if there are none, telling what is there, or one is missing.
    """
    if not root.is_dir():
        raise ValueError(f"folder of shards {shown(root)} does not exist")
    known = {}
    for info in (root / name for name in INFOS):
        if info.is_file():
            known = _splits(info)
            break
    for name in EVALUATION if split is None else dict.fromkeys((split, *spellings(split))):
        shards = _shards_of(root, name, known)
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(f"shard {shown(missing[0])} does not exist")
        if shards:
            return shards
    there = [path.name for path in sorted(root.glob("*.tar"))]
    asked = f"one of {', '.join(EVALUATION)}" if split is None else repr(shown(split))
    raise ValueError(
        f"split must name shards (.tar) in {shown(root)}, got {asked}; it holds {some(there) if there else 'none'}"
    )


def _shards_of(root: Path, split: str, known: dict[str, list[str]]) -> list[Path]:
    if split.endswith(".tar"):
        return [root / name for name in _expanded(split)]
    if (listed := _spelt(split, known)) is not None:
        return [root / name for name in known[listed]]
    folder = root / (_spelt(split, subfolders(root)) or split)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
    else:
        paths = [path for path in sorted(root.glob("*.tar")) if _spelt(split, re.split(r"[\W_]+", path.stem))]
    return [path for path in paths if not is_hidden(path.name)]


def _spelt(split: str, there: Collection[str]) -> str | None:
    """The name itself where it is there, else one that differs in its case, or None."""
    return split if split in there else next((name for name in there if name.lower() == split.lower()), None)


def _splits(info: Path) -> dict[str, list[str]]:
    """{split: names of its shards}, as timm describes them."""
    try:
        splits = json.loads(info.read_text(encoding="utf-8")).get("splits", {})
        return {name: [str(file) for file in split["filenames"]] for name, split in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{shown(info)} must list the shards of each split, got {type(error).__name__}: {error}"
        ) from None


def _class_names(file: Path) -> list[str]:
    """One a line."""
    try:
        names = [line.removesuffix("\r") for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown(file)} must be text in UTF-8: {error}") from None
    while names and not names[-1].strip():
        names.pop()
    return names


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
    suffixes = image_suffixes()
    key, image, label, seen = None, None, None, set()
    for name, offset, content in tar_files(shard, links=True):
        named = _NAMED.fullmatch(name)
        if named is None or any(map(is_hidden, name.removeprefix("./").split("/"))):
            continue
        kind = named[2].lower()
        is_image = f".{kind}" in suffixes
        if content is None and (is_image or kind == LABEL):
            raise ValueError(f"{shown(name)} in {shown(shard)} must be a plain file, got a link")
        if named[1] != key:
            yield from _whole(shard, key, image, label)
            key, image, label = named[1], None, None
            if key in seen:
                raise ValueError(
                    f"sample {shown(key)} in {shown(shard)} must come once, with its files in a row, got it again"
                )
            seen.add(key)
        if is_image:
            if image is not None:
                both = f"{shown(image[0])} and {shown(name)}"
                raise ValueError(f"sample {shown(key)} in {shown(shard)} must have one image, got {both}")
            image = (name, offset, len(content))
        elif kind == LABEL:
            if label is not None:
                raise ValueError(f"sample {shown(key)} in {shown(shard)} must have one .{LABEL} file, got two")
            label = bytes(content)
    yield from _whole(shard, key, image, label)


def _whole(shard: Path, key: str | None, image: tuple | None, label: bytes | None) -> Iterator[tuple]:
    """The sample; none before the first file."""
    if key is None:
        return
    sample = f"sample {shown(key)} in {shown(shard)}"
    if image is None:
        raise ValueError(f"{sample} must have an image ({', '.join(IMAGES)}), got none")
    found = None if label is None else _LABEL.fullmatch(label)
    if found is None:
        got = "none" if label is None else repr(label[:24])
        raise ValueError(f"{sample} must have a number in its .{LABEL} file, got {got}")
    yield (*image, int(found[1]))
