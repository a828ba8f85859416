"""What stands beside weights and says what they are of: args.yaml of timm's train.py, config.json for the Hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import yaml

# Of a run of timm's train.py, the first that is there counts.
TIMM_FILES = ("model_best.pth.tar", "last.pth.tar", "checkpoint-*.pth.tar", "recovery-*.pth.tar")


@dataclass(frozen=True)
class TimmRun:
    """A run of timm's train.py."""

    name: str
    """Name of the model, as `timm.create_model` takes it."""
    args: dict[str, Any]
    """Every argument of the script."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that the model was made for, where they were given."""
        size = (self.args.get("model_kwargs") or {}).get("img_size") or self.args.get("img_size")
        if size is None and self.args.get("input_size"):
            size = self.args["input_size"][-2:]
        if size is None:
            return None
        return (size, size) if isinstance(size, int) else tuple(size)

    def arguments(self) -> dict[str, Any]:
        """What train.py gives `timm.create_model`, as far as it makes the model."""
        args = self.args
        channels = args.get("in_chans") or (args["input_size"][0] if args.get("input_size") else None)
        found = {"num_classes": args.get("num_classes"), "in_chans": channels, "global_pool": args.get("gp")}
        found |= args.get("model_kwargs") or {}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class HubFolder:
    """A folder of timm's `save_for_hf`."""

    folder: Path
    """What `timm.create_model("local-dir:FOLDER")` takes as FOLDER."""
    config: dict[str, Any]
    """What config.json holds."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that the weights are for, where it says them."""
        size = (self.config.get("model_args") or {}).get("img_size")
        if size is None:
            size = self.config.get("pretrained_cfg", {}).get("input_size", (None, None, None))[1:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        return None if None in size else size

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """By label, where all are known."""
        names = self.config.get("label_names") or self.config.get("pretrained_cfg", {}).get("label_names")
        if isinstance(names, Mapping):
            try:
                names = [names[str(label)] for label in range(len(names))]
            except KeyError:
                return None
        return tuple(map(str, names)) if names else None


def timm_run(path: Path, checkpoint: Mapping[str, Any] | None = None) -> TimmRun | None:
    """The run of timm's train.py that a file is of, if it is of one.

    Args:
        path: the file; args.yaml stands beside it.
        checkpoint: what it holds: its own arguments count first.

    Raises:
        ValueError: if args.yaml cannot be read.
    """
    arch = None
    if checkpoint is not None:
        args = checkpoint.get("args")
        args = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
        if isinstance(args.get("model"), str):
            return TimmRun(args["model"], args)
        arch = checkpoint.get("arch")
    beside = path.with_name("args.yaml")
    if not beside.is_file():
        # A script that has no arguments to save has timm write the class's name there.
        return TimmRun(arch, {}) if isinstance(arch, str) and timm.is_model(arch) else None
    try:
        args = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{beside} must be what timm's train.py wrote, got: {error}") from None
    if not isinstance(args, dict) or not isinstance(args.get("model"), str):
        raise ValueError(f"{beside} must be what timm's train.py wrote, got one without model")
    return TimmRun(args["model"], args)


def hub_folder(path: Path) -> HubFolder | None:
    """The folder of `save_for_hf` that a file lies in, if it lies in one.

    Raises:
        ValueError: if config.json cannot be read.
    """
    beside = path.with_name("config.json")
    if not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{beside} must be what timm's save_for_hf wrote, got: {error}") from None
    return HubFolder(path.parent, config) if isinstance(config, dict) and "architecture" in config else None
