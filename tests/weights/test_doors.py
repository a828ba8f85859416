"""Every door takes every source of weights, and says the same of what is none: doors x sources on one tiny model."""

import argparse
import http.server
import importlib
import re
import threading
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import timm
import torch

import vmoe_torch
from vmoe_torch.checkpoints import CheckpointError, convert, export_original, read_original, read_weights
from vmoe_torch.cli import main
from vmoe_torch.commands import sources as commands_sources
from vmoe_torch.commands.sources import open_model
from vmoe_torch.parallel import export_safetensors
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.start import build_starting_model
from vmoe_torch.weights import sources
from vmoe_torch.weights.names import to_original

NAME, SIZE = "test_vmoe", {"num_classes": 3, "img_size": 32, "num_experts": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FILES = ("converted.safetensors", "exported.safetensors", "x.npz", "x.pt")
# Opened by timm itself, which takes nothing but files at `checkpoint_path`.
TIMMS_OWN = (*FILES, "run/best.pt", "timm/last.pth.tar", "hub/model.safetensors")
PLACES = ("PREFIX", *FILES, "run", "run/best.pt", "timm", "timm/last.pth.tar", "hub", "hub/model.safetensors")
SOURCES = (
    *PLACES,
    "local-dir:hub",
    *(f"{NAME}={file}" for file in ("x.npz", "x.pt", "file://x.npz")),
    *(f"file://{file}" for file in ("PREFIX", *FILES)),
    *(f"http://{file}" for file in ("PREFIX", *FILES, "x.npz?download=true")),
    *(f"memory://{file}" for file in ("PREFIX", "exported.safetensors", "x.npz")),
)
NOWHERE = (
    "none",
    "none.pt",
    "none.safetensors",
    "none.npz",
    "file://none",
    "file://none.npz",
    "http://none.safetensors",
)
VERBS = ("eval", "predict", "fewshot", "analyze", "budget", "export", "plan", "convert")


def made(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **SIZE).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(name of a source -> what a user types, the model's logits); the files are served, too."""
    folder, model = tmp_path_factory.mktemp("doors"), made()
    export_original(model, folder / "PREFIX")
    convert(folder / "PREFIX", folder / "converted.safetensors")
    export_safetensors(model, folder / "exported.safetensors")
    np.savez(folder / "x.npz", **{key: a.numpy() for key, a in to_original(model.state_dict(), 2).items()})
    torch.save(model.state_dict(), folder / "x.pt")
    for name in ("run", "timm"):
        (folder / name).mkdir()
    config = {"model": {"name": NAME, "kwargs": SIZE}, "data": {"name": "fashion_mnist"}}
    config["model"]["kwargs"] = {key: value for key, value in SIZE.items() if key != "num_classes"}
    run = {"format": 1, "config": config, "class_names": ["a", "b", "c"], "model": model.state_dict(), "ema": None}
    torch.save(run, folder / "run/best.pt")
    size = {"num_classes": 3, "img_size": 32, "model_kwargs": {"num_experts": 2}}
    state = {"arch": NAME, "state_dict": dict(model.state_dict()), "args": argparse.Namespace(model=NAME, **size)}
    torch.save(state, folder / "timm/last.pth.tar")
    vmoe_torch.save_for_hf(model, folder / "hub", safe_serialization=True)
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        if path.is_file():
            memory.pipe(f"/doors/{path.name}", path.read_bytes())
    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        roots = {"http://": f"http://127.0.0.1:{server.server_address[1]}/", "memory://": "memory://doors/"}

        def typed(source: str) -> str:
            before, url, file = re.fullmatch(r"(\w+=|local-dir:)?(\w+://)?(.*)", source).groups("")
            return before + roots.get(url, f"{url}{folder}/") + file

        yield typed, model(IMAGES)
        server.shutdown()
        thread.join()


def loaded(source, tmp_path):
    model = made(1)
    model.load_pretrained(source)
    return model


def named(source, tmp_path, **overlay):
    overlay = {"pretrained_cfg_overlay": overlay or {"file": source}, "cache_dir": tmp_path}
    return timm.create_model(NAME, pretrained=True, **overlay, **SIZE)


def converted(source, tmp_path):
    """To what the source is not; what the command says is raised."""
    target = tmp_path / ("y" if source.endswith(".safetensors") else "y.safetensors")
    assert main(["convert", source, str(target)]) == 0, "convert"
    return loaded(target, tmp_path)


def written(source, tmp_path):
    export_original(source, tmp_path / "y", num_heads=2)
    return loaded(tmp_path / "y", tmp_path)


def begun(source, tmp_path):
    kwargs = {key: value for key, value in SIZE.items() if key != "num_classes"}
    return build_starting_model(ModelConfig(NAME, checkpoint=source, kwargs=kwargs), 3)


# Through `open_model` go all verbs of `VERBS`.
DOORS = {
    "MODEL": lambda source, tmp_path: open_model(source).model,
    "model.checkpoint": begun,
    "load_pretrained": loaded,
    "overlay file": named,
    "overlay url": lambda source, tmp_path: named(source, tmp_path, url=source),
    "vmoe convert": converted,
    "export_original": written,
    "upcycle": lambda source, tmp_path: vmoe_torch.upcycle(source, moe_layers=()),
}


def enters(door: str, source: str) -> bool:
    """All but what is no URL, and a file that says nothing of its heads: --num-heads must, or its folder."""
    is_url = re.match(r"\w+://", source) is not None
    return is_url if door == "overlay url" else (door, source) != ("vmoe convert", "hub/model.safetensors")


@pytest.mark.parametrize(("door", "source"), [(d, s) for d in DOORS for s in SOURCES if enters(d, s)])
def test_every_door_takes_every_source(door, source, place, tmp_path):
    typed, logits = place
    model = DOORS[door](typed(source), tmp_path).eval()
    assert torch.equal(model(IMAGES), logits)


@pytest.mark.parametrize("source", SOURCES)
def test_checkpoint_path_takes_what_timm_opens(source, place, tmp_path):
    typed, logits = place
    open_here = partial(timm.create_model, NAME, checkpoint_path=typed(source), **SIZE)
    # Arrays are the model's own matter: whatever ends in .npz is for `load_pretrained`.
    if source in TIMMS_OWN or source.endswith(".npz"):
        assert torch.equal(open_here().eval()(IMAGES), logits)
    else:
        with pytest.raises(FileNotFoundError):
            open_here()


@pytest.mark.parametrize("source", NOWHERE)
def test_every_door_says_the_same_of_what_is_not_there(source, place, tmp_path, capsys):
    name = place[0](source)
    said = {}
    doors = [door for door in DOORS if enters(door, source)]
    for door in doors:
        try:
            DOORS[door](name, tmp_path)
        except CheckpointError as error:
            said[door] = str(error)
        except AssertionError:
            said[door] = capsys.readouterr().err.removeprefix("vmoe convert: ").rstrip("\n")
    assert list(said) == doors
    assert len(set(said.values())) == 1, said
    assert name in said["MODEL"]


@pytest.mark.parametrize("file", ["x.npz", "x.safetensors", "x.pt"])
def test_a_damaged_file_of_a_url_is_named_by_it(file, tmp_path):
    (tmp_path / file).write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"^(checkpoint )?file://{tmp_path}/{file} (must be|cannot be)"):
        read_weights(f"file://{tmp_path}/{file}")


def test_every_verb_opens_its_model_through_one_door():
    for verb in VERBS:
        assert importlib.import_module(f"vmoe_torch.commands.{verb}").open_model is commands_sources.open_model, verb


def test_plan_takes_weights(place, capsys):
    options = ["--gpus", "2", "--ep", "2", "--batch-size", "4"]
    assert main(["plan", place[0]("x.npz"), *options]) == 0
    assert "fits" in capsys.readouterr().out


def test_a_released_name_is_a_source_everywhere(place, tmp_path, monkeypatch):
    """Its file comes from the cache."""
    typed, logits = place
    monkeypatch.setattr(sources, "cached_checkpoint", lambda url, progress: Path(typed("converted.safetensors")))
    for tag in ("vmoe_s32_last2_e8", "vmoe_s32_last2_e8.randaug_light1_in1k"):
        for door in ("model.checkpoint", "load_pretrained", "overlay file", "export_original"):
            assert torch.equal(DOORS[door](tag, tmp_path).eval()(IMAGES), logits), (door, tag)
    with pytest.raises(ValueError, match="must have pretrained weights to be used by its name, got 'vmoe_s32'"):
        loaded("vmoe_s32", tmp_path)


def test_an_archive_tells_an_ensemble_and_a_train_state(tmp_path):
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "moe_layers": "last1", "num_classes": 5, "img_size": 64}
    model = timm.create_model("eee_s32_last2_e8", **size)
    export_original(model, tmp_path / "x")
    arrays = {f"params/{path}": a.numpy() for path, a in read_original(str(tmp_path / "x")).items()}
    np.savez(tmp_path / "x.npz", **arrays, **{"opt_state/count": np.zeros(3), "step": np.int64(3)})
    opened = open_model(tmp_path / "x.npz").model
    assert opened.ensemble_size == 2
    other = timm.create_model("eee_s32_last2_e8", **size)
    other.load_pretrained(str(tmp_path / "x.npz"), "params/")
    for loaded_model in (opened, other):
        assert all(torch.equal(value, loaded_model.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"x\.npz must hold arrays named target/\.\.\., found none"):
        other.load_pretrained(str(tmp_path / "x.npz"), "target/")
    with pytest.raises(ValueError, match="must be loaded into an ensemble of 2 members, got 1"):
        loaded(tmp_path / "x.npz", tmp_path)


def test_a_dense_run_is_upcycled(tmp_path):
    """Of a model whose state dict does not say what it is."""
    kwargs = {"img_size": 32, "depth": 2}
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs).eval()
    config = {"model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs}}
    run = {"format": 1, "config": config, "class_names": ["a", "b", "c"], "model": dense.state_dict(), "ema": None}
    torch.save(run, tmp_path / "best.pt")
    sparse = vmoe_torch.upcycle(tmp_path, num_experts=2, renormalize_gates=True, capacity_factor=8.0).eval()
    torch.testing.assert_close(sparse(IMAGES), dense(IMAGES), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pretrained and model_args must go with a model's name, got /"):
        vmoe_torch.upcycle(tmp_path, model_args={"depth": 3})
