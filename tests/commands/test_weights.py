"""Every file and folder that holds weights is a MODEL: runs of timm's train.py, state dicts, folders for the Hub."""

import argparse
import json
import os

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

import vmoe_torch
from vmoe_torch.checkpoints import export_original, load_original, read_weights
from vmoe_torch.cli import main
from vmoe_torch.commands.sources import open_model
from vmoe_torch.evaluate import count_flops
from vmoe_torch.models.position import zoom_position
from vmoe_torch.parallel import export_safetensors
from vmoe_torch.train.build import build_model
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.start import load_start

ARGS = {
    "model": "test_vmoe",
    "num_classes": 3,
    "in_chans": None,
    "input_size": None,
    "img_size": 32,
    "gp": None,
    "mean": [0.1, 0.2, 0.3],
    "interpolation": "",
    "model_kwargs": {"num_experts": 2, "num_selected_experts": 1},
}
IMAGES = torch.randn(2, 3, 32, 32)


def made(name="test_vmoe", seed=0, **changes):
    torch.manual_seed(seed)
    size = {"num_classes": 3, "img_size": 32, "num_experts": 2, "num_selected_experts": 1}
    model = timm.create_model(name, **{**size, **changes}).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def timm_checkpoint(path, model, average=None, args=ARGS, plain=False):
    """As timm's CheckpointSaver writes it; `plain` leaves out what our state dicts say of themselves."""
    weights = model.state_dict()
    state = {"epoch": 1, "arch": ARGS["model"], "state_dict": dict(weights) if plain else weights, "version": 2}
    if average is not None:
        state["state_dict_ema"] = dict(average.state_dict()) if plain else average.state_dict()
    if args is not None:
        state["args"] = argparse.Namespace(**args)
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)


def write_args(folder, args=ARGS):
    folder.mkdir(exist_ok=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(args))


def same(model, source):
    opened = source.model
    for ours, theirs in zip(vmoe_torch.moe_layers(model).values(), vmoe_torch.moe_layers(opened).values(), strict=True):
        assert ours.routing() == theirs.routing()
    assert torch.equal(opened(IMAGES), model(IMAGES))


@pytest.mark.parametrize("place", ["", "model_best.pth.tar", "checkpoint-7.pth.tar"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_run_of_timms_script_is_a_model(tmp_path, place, plain):
    run = tmp_path / "run"
    timm_checkpoint(run / "checkpoint-7.pth.tar", made(), args=None, plain=plain)
    timm_checkpoint(run / "model_best.pth.tar", made(), args=None, plain=plain)
    timm_checkpoint(run / "last.pth.tar", made(seed=1), args=None, plain=plain)
    write_args(run)
    source = open_model(run / place)
    same(made(), source)
    assert source.model.num_classes == 3
    # The run's own preprocessing.
    assert source.transform.transforms[-1].mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_arguments_in_the_checkpoint_are_enough_and_nothing_in_it_is_run(tmp_path):
    timm_checkpoint(tmp_path / "a.pth.tar", made(), plain=True)
    same(made(), open_model(tmp_path / "a.pth.tar"))

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"state_dict": dict(made().state_dict()), "args": Harmful()}, tmp_path / "b.pth.tar")
    with pytest.raises(ValueError, match=r"b\.pth\.tar cannot be read"):
        open_model(tmp_path / "b.pth.tar")
    assert not (tmp_path / "harmed").exists()


def test_the_moving_average_is_taken_or_left(tmp_path):
    timm_checkpoint(tmp_path / "last.pth.tar", made(), average=made(seed=1), plain=True)
    source = open_model(tmp_path)
    same(made(seed=1), source)
    assert "moving average" in source.about
    same(made(), open_model(tmp_path, average=False))
    same(made(seed=1), open_model(tmp_path, average=True))
    timm_checkpoint(tmp_path / "last.pth.tar", made())
    same(made(), open_model(tmp_path, average=False))
    with pytest.raises(ValueError, match="must hold a moving average of the weights for --weights average, got none"):
        open_model(tmp_path, average=True)


def test_commands_take_the_weights_that_are_asked_for(tmp_path, capsys):
    timm_checkpoint(tmp_path / "last.pth.tar", made(), average=made(seed=1), plain=True)
    for choice, seed in (("last", 0), ("average", 1)):
        assert main(["convert", str(tmp_path), str(tmp_path / "x.safetensors"), "--weights", choice]) == 0
        written = load_file(tmp_path / "x.safetensors")
        assert torch.equal(written["blocks.0.attn.qkv.weight"], made(seed=seed).blocks[0].attn.qkv.weight)
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y"), "--weights", "last"]) == 2
    assert "--weights must go with a run" in capsys.readouterr().err


def test_another_timm_model_and_its_size(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, in_chans=1, depth=2).eval()
    args = {"model": "vit_tiny_patch16_224", "input_size": [1, 32, 32], "model_kwargs": {"depth": 2, "img_size": 32}}
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(**args)}, tmp_path / "last.pth.tar")
    source = open_model(tmp_path)
    assert (source.mode, source.model.num_classes) == ("L", 4)
    assert torch.equal(source.model(IMAGES[:, :1]), model(IMAGES[:, :1]))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_a_state_dict_alone_says_what_it_is_of(tmp_path, wrapper):
    model = made(num_experts=4, capacity_factor=0.5)
    vmoe_torch.set_routing(model, layers=["blocks.3.mlp"], num_selected_experts=3)
    wrapped = model
    for name in filter(None, reversed(wrapper.split("."))):
        wrapped = torch.nn.ModuleDict({name: wrapped})
    torch.save(wrapped.state_dict(), tmp_path / "x.pt")
    same(model, open_model(tmp_path / "x.pt"))
    torch.save({"model": wrapped.state_dict(), "epoch": 3}, tmp_path / "y.pth")
    same(model, open_model(tmp_path / "y.pth"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_shapes_tell_the_model_or_its_name_is_asked_for(tmp_path, suffix):
    def write(name, model):
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        path = tmp_path / f"{name}{suffix}"
        torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
        return path

    model = made(num_experts=4, num_selected_experts=2)
    path = write("known", model)
    source = open_model(path)
    same(model, source)
    assert "test_vmoe, by the shapes of its weights" in source.about
    same(model, open_model(f"test_vmoe={path}"))
    path = write("unknown", made(embed_dim=32))
    with pytest.raises(ValueError, match=r"must say what model it is of, .* or be given as NAME=.*unknown"):
        open_model(path)
    # test_vmoe is wider.
    with pytest.raises(ValueError, match=r"unknown.* must fit the model"):
        open_model(f"test_vmoe={path}")
    write_args(tmp_path, {**ARGS, "model_kwargs": {"embed_dim": 32, "num_selected_experts": 1}})
    same(made(embed_dim=32), open_model(path))


def test_a_folder_for_the_hub_is_a_model(tmp_path):
    model = made(num_experts=4)
    vmoe_torch.set_routing(model, capacity_factor=0.3)
    names = {"label_names": ["a", "b", "c"], "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    vmoe_torch.save_for_hf(model, tmp_path, safe_serialization="both", model_config=names)
    for place in (tmp_path, f"local-dir:{tmp_path}", tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        source = open_model(place)
        same(model, source)
        assert source.class_names == ("a", "b", "c")
        assert source.transform.transforms[-1].mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_every_door_takes_every_source(tmp_path):
    model = made()
    run = tmp_path / "run"
    timm_checkpoint(run / "last.pth.tar", model, plain=True)
    vmoe_torch.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    export_safetensors(model, tmp_path / "x.safetensors")
    export_original(model, tmp_path / "ckpt")
    for name in ("run", "run/last.pth.tar", "hub", "x.pt", "x.safetensors", "ckpt"):
        other, third = made(seed=1), made(seed=2)
        load_start(other, str(tmp_path / name))
        third.load_pretrained(str(tmp_path / name))
        for loaded in (open_model(tmp_path / name).model, other, third):
            assert torch.equal(loaded.state_dict()["head.weight"], model.head.weight), name
            assert torch.equal(loaded.state_dict()["blocks.1.mlp.fc1.weight"], model.blocks[1].mlp.fc1.weight), name


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"best\.pt is empty"):
        open_model(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.safetensors is empty"):
        open_model(tmp_path / "x.safetensors")
    torch.save({"weights": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt must hold a state dict, alone or as state_dict, .*got weights"):
        open_model(tmp_path / "x.pt")
    torch.save([1], tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"y\.pt must hold a state dict, got list"):
        open_model(tmp_path / "y.pt")
    write_args(tmp_path / "odd", {"lr": 1})
    torch.save(dict(made().state_dict()), tmp_path / "odd/x.pt")
    with pytest.raises(ValueError, match=r"args\.yaml must be what timm's train\.py wrote, got one without model"):
        open_model(tmp_path / "odd/x.pt")


@pytest.mark.parametrize("place", ["", "1000", "1000/state"])
@pytest.mark.parametrize("marker", ["_METADATA", "checkpoint"])
def test_a_folder_of_orbax_is_refused_with_a_way_out(tmp_path, place, marker):
    (tmp_path / "1000/state").mkdir(parents=True)
    (tmp_path / "1000/state" / marker).write_text("{}")
    with pytest.raises(ValueError, match=r"1000/state must not be a checkpoint of orbax.*PREFIX\.index"):
        open_model(tmp_path / place)


def test_positions_keep_their_grid(tmp_path):
    """A grid of 1 x 4 has as many patches as one of 2 x 2."""
    wide = made(img_size=(16, 64))
    torch.save({"state_dict": dict(wide.state_dict()), "args": argparse.Namespace(**ARGS)}, tmp_path / "timm.pth.tar")
    args = {**ARGS, "img_size": None, "input_size": [3, 16, 64]}
    timm_checkpoint(tmp_path / "timm.pth.tar", wide, args=args, plain=True)
    config = {"model": {"name": "test_vmoe", "kwargs": {"img_size": [16, 64]}}}
    run = {"format": 1, "config": config, "class_names": [], "model": dict(wide.state_dict()), "ema": None}
    torch.save(run, tmp_path / "run.pt")
    torch.save(wide.state_dict(), tmp_path / "plain.pt")
    export_safetensors(wide, tmp_path / "x.safetensors")
    export_original(wide, tmp_path / "ckpt")
    vmoe_torch.save_for_hf(wide, tmp_path / "hub", safe_serialization=True)
    for name in ("timm.pth.tar", "run.pt", "plain.pt", "x.safetensors", "ckpt", "hub"):
        assert read_weights(tmp_path / name).grid == (1, 4), name
        for size in (32, (16, 64), (64, 16), 64):
            model = made(img_size=size, seed=1)
            want = zoom_position(wide.pos_embed, model.pos_embed, model.patch_embed.grid_size, 1, (1, 4))
            load_start(model, str(tmp_path / name))
            assert torch.equal(model.pos_embed, want), (name, size)
    # By hand, corners on corners: both rows are the first and the last column of the one row.
    square = made(seed=1)
    load_start(square, str(tmp_path / "run.pt"))
    assert torch.equal(square.pos_embed[0, 1:], wide.pos_embed[0, [1, 4, 1, 4]])
    same_grid = made(img_size=(16, 64), seed=1)
    load_original(tmp_path / "ckpt", same_grid)
    assert torch.equal(same_grid.pos_embed, wide.pos_embed)
    assert open_model(tmp_path / "ckpt").model.patch_embed.grid_size == (1, 4)


def test_a_state_dict_of_another_grid_is_not_copied():
    wide, square = made(img_size=(16, 64)), made(seed=1)
    with pytest.raises(RuntimeError, match=r"pos_embed must be of a grid of \(2, 2\), got one of \(1, 4\)"):
        square.load_state_dict(wide.state_dict())
    made(img_size=(16, 64), seed=1).load_state_dict(wide.state_dict())


def test_a_moving_average_of_torchs_is_a_model(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(made())
    torch.save(average.state_dict(), tmp_path / "x.pt")
    same(made(), open_model(tmp_path / "x.pt"))


def test_timms_folder_keeps_the_grid(tmp_path):
    wide = made(img_size=(16, 64))
    vmoe_torch.save_for_hf(wide, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(32, 32))
    if hasattr(model, "pretrained_model_args"):
        want = zoom_position(wide.pos_embed, model.pos_embed, (2, 2), 1, (1, 4))
        assert torch.equal(model.pos_embed, want)


def test_a_vision_transformers_positions_keep_their_grid(tmp_path):
    name, size = "vit_tiny_patch16_224", {"depth": 1, "num_classes": 3}
    wide = timm.create_model(name, img_size=(16, 64), **size)
    config = {"model": {"name": name, "kwargs": {"img_size": [16, 64]}}}
    run = {"format": 1, "config": config, "class_names": [], "model": dict(wide.state_dict()), "ema": None}
    torch.save(run, tmp_path / "run.pt")
    model = build_model(ModelConfig(name, kwargs={"img_size": 32, "depth": 1}), 3)
    load_start(model, str(tmp_path / "run.pt"))
    image = wide.pos_embed[:, 1:].unflatten(1, (1, 4)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(image, size=(2, 2), mode="bicubic", antialias=True)
    assert torch.equal(model.pos_embed[:, 1:], want.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(model.pos_embed[:, :1], wide.pos_embed[:, :1])
    assert not torch.equal(model.pos_embed, wide.pos_embed)


def test_a_square_that_is_only_guessed_is_said(caplog):
    zoom_position(torch.randn(1, 17, 8), torch.zeros(1, 10, 8), (3, 3), 1)
    assert "17 positions are taken for a grid of 4 x 4 patches" in caplog.text
    with pytest.raises(ValueError, match=r"must hold a grid of \(5, 4\), got 17 positions"):
        zoom_position(torch.randn(1, 17, 8), torch.zeros(1, 10, 8), (3, 3), 1, (5, 4))


def test_a_budget_travels_through_the_commands(run_folder, image_folder, tmp_path, capsys):
    data = ["--data", str(image_folder)]
    model = str(tmp_path / "cheap.pt")
    saves = ["--save", model, "--out", f"{tmp_path}/budget.json"]
    assert main(["budget", str(run_folder), *data, "--flops", "0.9", "--images", "4", *saves]) == 0
    capsys.readouterr()
    assert main(["eval", model, *data]) == 0
    shown = capsys.readouterr()
    assert "blocks.1.mlp num_selected_experts=2, eval_capacity_factor=" in shown.err
    before = open_model(run_folder)
    after = open_model(model)
    assert after.class_names == before.class_names
    assert after.mode == before.mode == "L"
    layer = vmoe_torch.moe_layers(after.model)["blocks.1.mlp"]
    # What the budget chose, set by hand.
    for name, setting in json.loads((tmp_path / "budget.json").read_text())["chosen"]["settings"].items():
        vmoe_torch.set_routing(before.model, layers=[name], **setting)
    images = torch.randn(4, 1, 28, 28)
    assert count_flops(after.model, images).total == count_flops(before.model, images).total
    assert torch.equal(after.model(images), before.model(images))
    assert layer.chosen_routing().keys() == {"num_selected_experts", "eval_capacity_factor", "batch_priority"}
    image = next(image_folder.glob("val/*/*.png"))
    assert main(["predict", model, str(image)]) == 0
    assert "routing chosen for these weights" in capsys.readouterr().err


def test_convert_takes_what_is_a_model(tmp_path):
    model = made()
    vmoe_torch.set_routing(model, layers=["blocks.5.mlp"], num_selected_experts=2)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    for source, target in (
        ("x.pt", "a.safetensors"),
        ("x.pt", "ckpt"),
        ("a.safetensors", "again"),
        ("again", "b.safetensors"),
    ):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
        same(model, open_model(tmp_path / target))
    assert main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "c.safetensors"), "--train-state"]) == 2
