"""What weights a name means: every file, folder and URL that weights are kept in, read as one state dict.

| name | weights | the model is told by |
| --- | --- | --- |
| folder or file of `vmoe train` | its best checkpoint, its moving average where it kept one | its configuration |
| folder of timm's train.py, or a .pth.tar | model_best, else last, else the newest; its moving average | args.yaml |
| folder or file of timm's `save_for_hf` | model.safetensors or pytorch_model.bin | config.json |
| .pt, .pth, .bin or .ckpt with a state dict | it | what our models' state dicts say; files beside it; shapes |
| .safetensors | it | its header; files beside it; shapes |
| PREFIX of the original; .npz | it | shapes |
| URL of any of these files, or of a PREFIX | it | as above, without what stands beside |
| NAME=FILE | any of these | NAME, a timm model |
| hf-hub:NAME; a timm model's name | the pretrained ones | the name |

Nothing that a file holds is run: `torch.load` reads with weights_only=True.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vmoe_torch.layers.choice import description_of, metadata_of, restore_routing, with_metadata
from vmoe_torch.weights.adapt import load_adapted
from vmoe_torch.weights.beside import TIMM_FILES, HubFolder, TimmRun, hub_folder, timm_run
from vmoe_torch.weights.conversion import Origin, read_converted, read_npz, read_state, weights_of
from vmoe_torch.weights.grid import grid_of, square_grid
from vmoe_torch.weights.original.wire import CheckpointError
from vmoe_torch.weights.pretrained import cached_checkpoint
from vmoe_torch.weights.remote import is_remote, local_copy, suffix_of
from vmoe_torch.weights.safetensors_files import read_header
from vmoe_torch.weights.updates import is_update, read_update, updates_in

# What `vmoe train` writes, the name of its best weights, and where their header tells of the run.
RUN_FORMAT, BEST, RUN_KEY = 1, "best.safetensors", "vmoe_torch_run"
# Where training programs keep the weights, and their moving average, in a checkpoint.
_WEIGHTS = ("state_dict", "model", "model_state_dict")
_AVERAGES = ("state_dict_ema", "model_ema", "ema")
# What wraps a model and shows in the names of its weights.
_WRAPPERS = ("module", "_orig_mod", "model")
# What orbax, with which the original's fine-tuning saves, leaves in a folder.
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "_sharding", "commit_success.txt", "checkpoint")


@dataclass(frozen=True)
class Weights:
    """Weights, and what is known of the model that they are of."""

    source: str
    """The name that was read, for errors."""
    state: Mapping[str, Tensor] = field(repr=False)
    """Tensors by the names that timm's models have; the metadata says what our models' state dicts say."""
    origin: Origin | None = None
    """What the original's layout says beside its weights."""
    name: str | None = None
    """Name of the timm model, where the user told it."""
    run: dict[str, Any] | None = field(default=None, repr=False)
    """Everything in a checkpoint of `vmoe train`."""
    timm: TimmRun | None = None
    """What a run of timm's train.py says beside its weights."""
    hub: HubFolder | None = None
    """What a folder of timm's `save_for_hf` says beside its weights."""
    average: bool = False
    """Whether the weights are a moving average."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches that there are positions for; None if that is not known."""
        described = description_of(self.state)
        if described is not None:
            return tuple(described["grid"])
        if self.origin is not None:
            return square_grid(self.state)
        if "patch_embed.proj.weight" not in self.state:
            return None
        size = None
        if self.run is not None:
            config = self.run["config"].get("model", {})
            size = config.get("kwargs", {}).get("img_size") or _default_size(config.get("name", ""))
        elif self.timm is not None:
            size = self.timm.image_size or _default_size(self.timm.name)
        elif self.hub is not None:
            size = self.hub.image_size
        elif self.name is not None:
            size = _default_size(self.name)
        return None if size is None else grid_of(size, self.state)


def read_weights(
    source: str | os.PathLike, *, average: bool = True, array_prefix: str = "", progress: bool = False
) -> Weights:
    """Reads the weights that a name means.

    Args:
        source: see the table above.
        average: whether to take the moving average, where there is one.
        array_prefix: what the names of the wanted arrays in an .npz begin with.
        progress: whether to show a bar, for a download and a checkpoint of the original.

    Raises:
        ValueError: if there is none, or it cannot be read; CheckpointError is one.
    """
    text = os.fspath(source)
    name, file = _named(text)
    if name is not None:
        return replace(read_weights(file, average=average, array_prefix=array_prefix, progress=progress), name=name)
    text = text.removeprefix("local-dir:")
    if is_prefix(text):
        state, origin = read_state(text, progress=progress)
        return Weights(text, state, origin)
    if is_remote(text):
        with local_copy(text, progress) as copy:
            try:
                return replace(_read_file(Path(copy), average, array_prefix), source=text)
            except ValueError as error:
                raise type(error)(str(error).replace(copy, text)) from None
    path = Path(text)
    if path.is_dir():
        return _read_folder(path, average)
    # Their own readers say that there is none.
    if path.is_file() or path.suffix in (".safetensors", ".npz"):
        return _read_file(path, average, array_prefix)
    if text.startswith("hf-hub:") or timm.is_model(text):
        return _read_pretrained(text, progress)
    raise CheckpointError(
        f"checkpoint {text} does not exist; weights must be a run folder, a checkpoint file, a PREFIX of the original, "
        f"the URL of a file or PREFIX, or a timm model's name, got {text!r}"
    )


def load_original(
    prefix: str | os.PathLike, model: nn.Module, *, array_prefix: str = "", progress: bool = False
) -> None:
    """Loads a checkpoint of the original, or any other weights, into a model.

    Resolution, patch size, channels and number of classes are adapted, as `weights.adapt.load_adapted` says. The
    routing that was chosen for the weights, where they say it, becomes the model's.

    Args:
        prefix: of the original's files, or what else `read_weights` reads.
        model: a VMoE or VMoEEnsemble; nothing in it changes on an error.
        array_prefix: what the names of the wanted arrays in an .npz begin with.
        progress: whether to show a bar.

    Raises:
        CheckpointError: if a file of the original is damaged or missing.
        ValueError: if it cannot be read, or a parameter does not fit the model.
    """
    weights = read_weights(prefix, array_prefix=array_prefix, progress=progress)
    size = 1 if weights.origin is None else weights.origin.ensemble_size
    # Files without the members' dim may be an ensemble's too, as those that fine-tuning begins from.
    if size not in (1, model.ensemble_size):
        raise ValueError(f"{prefix} must be loaded into an ensemble of {size} members, got {model.ensemble_size}")
    routed_before = restore_routing(model, metadata_of(weights.state), os.fspath(prefix))
    try:
        load_adapted(model, weights_of(weights.state), os.fspath(prefix), grid=weights.grid)
    except ValueError:
        for layer, routing in routed_before:
            layer.restore_routing(routing)
        raise


def is_weights(source: str | os.PathLike) -> bool:
    """Whether `read_weights` would look into this: a file or folder that exists, or a name only a file has."""
    text = os.fspath(source)
    if _named(text)[0] is not None or text.startswith(("local-dir:", "hf-hub:")):
        return True
    return is_prefix(text) or bool(suffix_of(text)) or Path(text).exists()


def is_prefix(text: str) -> bool:
    """Whether a path or URL is what the names of the original's files begin with."""
    return not suffix_of(text) if is_remote(text) else Path(f"{text}.index").is_file()


def _named(text: str) -> tuple[str | None, str]:
    """NAME and FILE of NAME=FILE; no name where it is a file as a whole."""
    name, _, file = text.partition("=")
    return (name, file) if file and not Path(text).exists() and timm.is_model(name) else (None, text)


def pretrained_model(name: str) -> nn.Module:
    """A timm model with its pretrained weights.

    Args:
        name: of timm, or hf-hub:NAME.

    Raises:
        ValueError: if it has none, or they cannot be had.
    """
    if not name.startswith("hf-hub:") and not timm.is_model_pretrained(name):
        raise ValueError(f"model must have pretrained weights to be used by its name, got {name!r}")
    try:
        return timm.create_model(name, pretrained=True)
    # What downloads raise depends on the library that timm uses.
    except Exception as error:
        raise ValueError(f"weights of {name} cannot be had: {error}") from error


def _read_pretrained(name: str, progress: bool) -> Weights:
    released = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if released is not None and released.custom_load and released.url:
        state, origin = read_converted(cached_checkpoint(released.url, progress=progress))
        return Weights(name, state, origin, name)
    return Weights(name, pretrained_model(name).state_dict(), name=None if released is None else name)


def _read_folder(folder: Path, average: bool) -> Weights:
    if is_update(folder):
        return _of_run(folder, read_update(folder), average)
    for found in (_run_checkpoint(folder, average), _timm_checkpoint(folder), _hub_weights(folder)):
        if found is not None:
            return _read_folder(found, average) if found.is_dir() else _read_file(found, average)
    _refuse_orbax(folder)
    inside = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(inside[:6]) + (f" and {len(inside) - 6} more" if len(inside) > 6 else "")
    raise ValueError(
        f"run folder {folder} must hold a checkpoint, got none: neither checkpoints/ of vmoe train, nor "
        f"{', '.join(TIMM_FILES)} of timm's train.py, nor config.json of timm's save_for_hf; "
        f"it has {shown or 'nothing'}"
    )


def _run_checkpoint(folder: Path, average: bool) -> Path | None:
    """The best, else the last, checkpoint of `vmoe train`; the last where the best holds the moving average alone and
    that is not wanted."""
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    last = max(updates_in(inside), default=None)
    # The second is that of earlier versions, which held both.
    best = next((path for path in (inside / BEST, inside / "best.pt") if path.is_file()), last)
    if average or last is None or best.name != BEST:
        return best
    return last if (read_header(best, RUN_KEY) or {}).get("average") else best


def _timm_checkpoint(folder: Path) -> Path | None:
    for name in TIMM_FILES:
        newest = max(folder.glob(name), key=lambda path: (path.stat().st_mtime, path.name), default=None)
        if newest is not None:
            return newest
    return None


def _hub_weights(folder: Path) -> Path | None:
    if not (folder / "config.json").is_file():
        return None
    names = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _refuse_orbax(folder: Path) -> None:
    """Raises a ValueError where the folder, or one inside it, is of orbax."""
    for place in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
        if place.is_dir() and any((place / name).is_file() for name in _ORBAX):
            raise ValueError(
                f"{place} must not be a checkpoint of orbax, as the original's fine-tuning writes: it cannot be read "
                "here. Save its parameters as PREFIX.index and PREFIX.data files with the original's vmoe.checkpoints, "
                "or as an .npz with their names, and give that"
            )


def _read_file(path: Path, average: bool, array_prefix: str = "") -> Weights:
    if path.suffix == ".npz":
        return Weights(str(path), *read_npz(path, array_prefix))
    if path.exists() and path.stat().st_size == 0:
        raise ValueError(f"checkpoint {path} is empty: its writer was stopped, or the disk was full")
    beside = {"timm": timm_run(path), "hub": hub_folder(path)}
    if path.suffix == ".safetensors":
        state, origin = read_converted(path)
        run = read_header(path, RUN_KEY)
        if run is not None:
            kinds = {"model": None, "ema": state} if run.get("average") else {"model": state, "ema": None}
            return _of_run(path, {**run, **kinds}, average)
        return Weights(str(path), cleaned(state), origin, **beside)
    return _from_checkpoint(path, load_safely(path), average, beside)


def load_safely(path: Path | str) -> Any:
    """`torch.load` onto the CPU, without running anything that the file holds.

    Raises:
        ValueError: if the file cannot be read so.
    """
    try:
        # timm's checkpoints hold the arguments of its script.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from error


def _from_checkpoint(path: Path, found: Any, average: bool, beside: dict[str, Any]) -> Weights:
    if not isinstance(found, Mapping):
        raise ValueError(f"checkpoint {path} must hold a state dict, got {type(found).__name__}")
    if {"format", "config", "class_names", "model"} <= found.keys():
        return _of_run(path, found, average)
    own = timm_run(path, found)
    if own is not None:
        beside["timm"] = own
    names = (*(_AVERAGES if average else ()), *_WEIGHTS)
    name = next((name for name in names if _is_state(found.get(name))), None)
    state = found if name is None else found[name]
    if not _is_state(state):
        keys = ", ".join(map(str, list(found)[:6]))
        raise ValueError(
            f"checkpoint {path} must hold a state dict, alone or as {', '.join(_WEIGHTS)}, got {keys or 0}"
        )
    return Weights(str(path), cleaned(state), average=name in _AVERAGES, **beside)


def _of_run(path: Path, found: Mapping[str, Any], average: bool) -> Weights:
    if found["format"] != RUN_FORMAT:
        raise ValueError(f"{path} must be of vmoe train's format {RUN_FORMAT}, got {found['format']!r}")
    averaged = average and found["ema"] is not None
    state = found["ema" if averaged else "model"]
    if state is None:
        raise ValueError(
            f"{path} must hold the last weights, got their moving average alone; update_* beside it has them"
        )
    return Weights(str(path), state, run=dict(found), average=averaged)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def cleaned(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict without what wraps the model: DDP, torch.compile, a trainer."""
    metadata = metadata_of(state)
    # torch's own AveragedModel counts.
    state = {name: value for name, value in state.items() if name != "n_averaged"}
    while state:
        wrapper = next(iter(state)).partition(".")[0]
        if wrapper not in _WRAPPERS or not all(name.startswith(f"{wrapper}.") for name in state):
            break
        state = {name[len(wrapper) + 1 :]: value for name, value in state.items()}
        metadata = {
            module.removeprefix(wrapper).removeprefix("."): values
            for module, values in metadata.items()
            if module == wrapper or module.startswith(f"{wrapper}.")
        }
    return with_metadata(state, metadata)


def _default_size(name: str) -> tuple[int, int] | None:
    """Height and width of the images of a timm model that is given none."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return None if cfg is None else tuple(cfg.input_size[1:])
