"""Videos in one folder per class: what counts, classes, splits and digests are those of image folders."""

from pathlib import Path
from typing import Any

from vmoe_torch.data.folder import ImageFolder
from vmoe_torch.data.video import SUFFIXES, Video, import_av


class VideoFolder(ImageFolder):
    """Videos below one folder per class; an item is (`Video`, label), of which a `ClipTransform` reads frames.

    Every file counts whose ending is .avi, .gif, .m4v, .mkv, .mov, .mp4 or .webm.

    Args:
        root: folder with one folder per class.
        class_names: as `ImageFolder`.
        mode: PIL mode of the frames, "RGB" or "L".
        **options: of `ImageFolder`. Videos are always turned as they say, so `exif` changes nothing.

    Raises:
        ValueError: as `ImageFolder`, and if PyAV is not installed. A file that cannot be read is found when frames of
            it are read.
    """

    kind = "video"

    def __init__(self, root: Path | str, class_names: tuple[str, ...] | None = None, mode: str = "RGB", **options: Any):
        import_av()
        super().__init__(root, class_names, mode, **options)

    @staticmethod
    def suffixes() -> frozenset[str]:
        """The endings, in small letters, of the files that count."""
        return SUFFIXES

    def __getitem__(self, index: int) -> tuple[Video, int]:
        path, label = self.samples[index]
        return Video(path, self.mode), label
