"""Which images lie below class folders: each folder read once, whatever links lead to it, nothing left out unsaid."""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from vmoe_torch.data.image import image_suffixes
from vmoe_torch.data.names import natural_key, shown

# What systems and programs leave in folders, in small letters; beside all whose names begin with a dot.
_SYSTEM = frozenset(
    (
        "@eadir",
        "__macosx",
        "__pycache__",
        "lost+found",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    )
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's or hidden, and nobody's data."""
    return name.startswith(".") or name.lower() in _SYSTEM


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder that are not hidden, in order.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry)]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(names, key=natural_key)


@dataclass
class Scan:
    """What lies below class folders."""

    kind: str = "image"
    """What a file that counts is called."""
    images: list[tuple[str, str]] = field(default_factory=list)
    """(path, class) of each image, by path; a class is the first folder below the one that was read."""
    classes: set[str] = field(default_factory=set)
    """Names of the class folders."""
    loose: str | None = None
    """An image that lies in no class folder, if there is one."""
    passed_over: Counter = field(default_factory=Counter)
    """How many files have an ending that no image has, by ending."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders that were read already, or that hold the one that was read."""

    def notices(self) -> list[str]:
        """What was passed over, for people."""
        texts = []
        if self.passed_over:
            kinds = ", ".join(
                f"{shown(kind) or 'no ending'} {count:,}" for kind, count in self.passed_over.most_common(8)
            )
            count, what = self.passed_over.total(), f"{self.kind}s"
            texts.append(f"passed over {count:,} files that are no {what} by their ending ({kinds})")
        if self.repeated:
            count = len(self.repeated)
            texts.append(f"passed over {count:,} links to folders read already ({shown(self.repeated[0])})")
        return texts


def scan(roots: Iterable[Path | str], kind: str = "image", suffixes: frozenset[str] | None = None) -> Scan:
    """Reads the folders, and says so while that takes long.

    Real folders come first, then links to folders, so that a link never takes the place of the folder itself. A link to
    a file is a file. Hidden files and folders do not count.

    Args:
        roots: folders of class folders, which exist.
        kind: what errors and notices call a file that counts.
        suffixes: endings, in small letters, of the files that count; None is those of images.

    Raises:
        ValueError: if a folder cannot be read, naming it.
    """
    walk = _Walk(kind, image_suffixes() if suffixes is None else suffixes)
    with walk.bar:
        for root in roots:
            walk.begin(str(root))
        while walk.links:
            links, walk.links = sorted(walk.links, key=lambda link: natural_key(link[0])), []
            for path, name in links:
                walk.follow(path, name)
    # By path, as timm has them.
    walk.found.images.sort(key=lambda image: natural_key(image[0]))
    return walk.found


class _Walk:
    def __init__(self, kind: str, suffixes: frozenset[str]) -> None:
        self.found = Scan(kind)
        self.suffixes = suffixes
        # What tells every folder that was read from others; asked for when a second way to it may turn up.
        self.seen: set = set()
        self.unasked: list[str] = []
        self.links: list[tuple[str, str | None]] = []
        self.bar = tqdm(
            desc="reading folders",
            unit=f" {kind}s",
            delay=2.0,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            leave=False,
            # The other processes of a run read the same.
            disable=os.environ.get("RANK", "0") != "0",
        )

    def begin(self, root: str) -> None:
        first = not self.seen
        # A link to a folder around this one would lead back here.
        self.seen.update(_identity(str(parent)) for parent in Path(root).resolve().parents)
        self.read([(root, None)], careful=not first)

    def follow(self, path: str, name: str | None) -> None:
        self.ask()
        if _identity(path) in self.seen:
            self.found.repeated.append(path)
            return
        if name is None:
            name = os.path.basename(path)
            self.found.classes.add(name)
        self.read([(path, name)], careful=True)

    def ask(self) -> None:
        self.seen.update(map(_identity, self.unasked))
        self.unasked.clear()

    def read(self, folders: list[tuple[str, str | None]], careful: bool) -> None:
        """Reads folders and all real folders below them, unless `careful` finds that they were read."""
        if careful:
            self.ask()
        while folders:
            path, name = folders.pop()
            if careful:
                identity = _identity(path)
                if identity in self.seen:
                    self.found.repeated.append(path)
                    continue
                self.seen.add(identity)
            else:
                self.unasked.append(path)
            before = len(self.found.images)
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        self._entry(entry, name, folders)
            except OSError as error:
                raise _unreadable(path, error) from error
            self.bar.update(len(self.found.images) - before)

    def _entry(self, entry: os.DirEntry, name: str | None, folders: list[tuple[str, str | None]]) -> None:
        if is_hidden(entry.name):
            return
        if entry.is_dir(follow_symlinks=False):
            if name is None:
                self.found.classes.add(entry.name)
            folders.append((entry.path, name or entry.name))
        elif entry.is_symlink() and _is_folder(entry):
            self.links.append((entry.path, name))
        elif (suffix := os.path.splitext(entry.name)[1].lower()) not in self.suffixes:
            self.found.passed_over[suffix] += 1
        elif name is None:
            self.found.loose = min(entry.path, self.found.loose or entry.path)
        # A link that leads nowhere is a broken image; a pipe or a socket would never end.
        elif entry.is_symlink() or entry.is_file():
            self.found.images.append((entry.path, name))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    # A link to itself.
    except OSError:
        return False


def _identity(path: str) -> tuple:
    """What tells a folder from others, whatever the path to it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    # Some network file systems number nothing.
    return (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(path),)


def _unreadable(path: Path | str, error: OSError) -> ValueError:
    return ValueError(f"folder {shown(path)} cannot be read: {error.strerror or error}")
