"""Int8 experts in every kind of file that weights come in, and what no file can have them for."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import vmoe_torch
from tests.tiny import SIZE, randomized, small_run, tiny_model, write_fashion_mnist
from vmoe_torch.checkpoints import export_original, load_original, read_weights
from vmoe_torch.cli import main
from vmoe_torch.commands.sources import Source, open_model, save_source
from vmoe_torch.layers.int8_experts import int8_layers
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.parallel import export_safetensors
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.start import build_starting_model

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NAME = "test_vmoe"


def quantised(**changes):
    return vmoe_torch.quantize_experts(randomized(tiny_model(**changes)))


def same(got, want):
    assert int8_layers(got).keys() == int8_layers(want).keys() != {}.keys()
    assert torch.equal(got.eval()(IMAGES), want(IMAGES))


@pytest.mark.parametrize(
    "changes", [{}, {"expert_hidden": [32, 16, 16, 0], "num_experts": 4}, {"router": "expert_choice"}]
)
def test_safetensors_and_checkpoint_path(tmp_path, changes):
    model, file = quantised(**changes), tmp_path / "x.safetensors"
    vmoe_torch.set_routing(model, capacity_factor=0.7)
    export_safetensors(model, file)
    same(open_model(file).model, model)
    made = timm.create_model(NAME, **SIZE, **changes, checkpoint_path=str(file))
    vmoe_torch.set_routing(made, capacity_factor=0.7)
    same(made, model)
    plain = tiny_model(**changes)
    load_original(file, plain)
    same(plain, model)


def test_hub_folders(tmp_path):
    model = quantised()
    for safe in (True, False):
        folder = tmp_path / str(safe)
        vmoe_torch.save_for_hf(model, folder, safe_serialization=safe)
        same(timm.create_model(f"local-dir:{folder}", pretrained=True), model)
        same(open_model(folder).model, model)
    card = (folder / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert f"**Parameters (M):** {parameters / 1e6:.1f}" in card
    assert "**Experts:** int8 weights, one scale for each expert and output channel" in card


@pytest.mark.parametrize("plain", [False, True])
def test_state_dicts(tmp_path, plain):
    """A plain one says nothing of its model: the shapes do."""
    model = timm.create_model(NAME, num_classes=5)
    vmoe_torch.quantize_experts(randomized(model))
    state = model.state_dict()
    torch.save(dict(state) if plain else state, tmp_path / "x.pt")
    got, told = open_weights(read_weights(tmp_path / "x.pt"))
    assert ("shapes" in told) == plain
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    assert torch.equal(got.eval()(images), model(images))
    save_source(Source(model, None, "RGB", None, None), tmp_path / "y.pt")
    assert torch.equal(open_model(tmp_path / "y.pt").model(images), model(images))


def test_ensembles_share_out_the_int8_experts(tmp_path):
    ensemble = vmoe_torch.quantize_experts(randomized(tiny_model("eee_s32_last2_e8")))
    export_safetensors(ensemble, tmp_path / "x.safetensors")
    ensemble.ensemble_output = "log_probabilities"
    same(open_model(tmp_path / "x.safetensors").model, ensemble)


def test_the_original_has_no_int8(tmp_path):
    model = quantised()
    export_safetensors(model, tmp_path / "x.safetensors")
    for source in (model, model.state_dict(), tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match=r"experts must be of floating point for the original's format, got int8"):
            export_original(source, tmp_path / "y", num_heads=model.blocks[0].attn.num_heads)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_files_that_do_not_fit_change_nothing(tmp_path):
    file = tmp_path / "x.safetensors"
    export_safetensors(quantised(), file)
    model = randomized(tiny_model(num_experts=2))
    before = model(IMAGES)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight must be"):
        load_original(file, model)
    assert not int8_layers(model)
    assert torch.equal(model(IMAGES), before)
    state = {name: value for name, value in quantised().state_dict().items() if not name.endswith("_scale")}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight_scale is missing"):
        load_original(tmp_path / "x.pt", model)
    int8 = quantised()
    export_safetensors(tiny_model(), tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight_scale is missing"):
        load_original(tmp_path / "float.safetensors", int8)


def test_a_run_does_not_begin_with_them(tmp_path):
    export_safetensors(quantised(), tmp_path / "x.safetensors")
    size = {name: value for name, value in SIZE.items() if name != "num_classes"}
    config = ModelConfig(name=NAME, checkpoint=str(tmp_path / "x.safetensors"), kwargs=size)
    with pytest.raises(ValueError, match=r"experts must be of floating point to be trained, got int8 ones in blocks.1"):
        build_starting_model(config, 5)


def test_convert_and_eval(tmp_path, capsys):
    """From a run to a file, and from a file to a smaller one."""
    (tmp_path / "images").mkdir()
    write_fashion_mnist(tmp_path / "images", 128, 64)
    run, float_file, file = tmp_path / "run", tmp_path / "float.safetensors", tmp_path / "int8.safetensors"
    data = ["run.progress=false", f"data.root={tmp_path / 'images'}"]
    assert main(["train", "--recipe=fashion_mnist", *small_run(run), *data]) == 0
    assert main(["convert", str(run), str(float_file)]) == 0
    assert main(["convert", str(float_file), str(file), "--experts", "int8"]) == 0
    again = tmp_path / "again.safetensors"
    assert main(["convert", str(run), str(again), "--experts", "int8"]) == 0
    floats, state, also = (load_file(name) for name in (float_file, file, again))
    assert also.keys() == state.keys()
    assert all(torch.equal(also[name], value) for name, value in state.items())
    experts = {name for name, value in state.items() if value.dtype == torch.int8}
    assert experts == {f"blocks.{block}.mlp.{layer}.weight" for block in (0, 1) for layer in ("fc1", "fc2")}
    for name in experts:
        scale = state[f"{name}_scale"].unsqueeze(-1)
        assert (state[name] * scale - floats[name]).abs().max() <= 0.5001 * scale.max()
    assert all(torch.equal(state[name], value) for name, value in floats.items() if name not in experts)
    smaller = 2.5 * sum(state[name].numel() for name in experts)
    assert file.stat().st_size < float_file.stat().st_size - smaller
    capsys.readouterr()
    for label in range(10):
        (tmp_path / "folder" / str(label)).mkdir(parents=True)
        Image.new("RGB", (28, 28), (20 * label, 0, 0)).save(tmp_path / "folder" / str(label) / "x.png")
    tables = []
    for model in (float_file, file):
        out = tmp_path / f"{model.stem}.json"
        assert main(["eval", str(model), "--data", str(tmp_path / "folder"), f"--out={out}"]) == 0
        tables.append(json.loads(out.read_text())[0])
    assert tables[0].keys() == tables[1].keys()
    assert tables[0]["images"] == tables[1]["images"] == 10
    assert tables[0]["flops"] == tables[1]["flops"]
    assert tables[0]["loss"] == pytest.approx(tables[1]["loss"], rel=0.01)


def test_convert_says_what_is_wrong(tmp_path, capsys):
    export_safetensors(tiny_model(), tmp_path / "x.safetensors")
    source, out = str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")
    for arguments, said in (
        ([source, str(tmp_path / "y")], "OUT must end in .safetensors for --experts int8"),
        ([source, out, "--train-state"], "--train-state must not go with --experts int8"),
    ):
        assert main(["convert", *arguments, "--experts", "int8"]) == 2
        assert capsys.readouterr().err.startswith(f"vmoe convert: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    # Twice is once.
    assert main(["convert", source, out, "--experts", "int8"]) == 0
    assert main(["convert", out, str(tmp_path / "z.safetensors"), "--experts", "int8"]) == 0
    once, twice = load_file(out), load_file(tmp_path / "z.safetensors")
    assert all(torch.equal(twice[name], value) for name, value in once.items())
