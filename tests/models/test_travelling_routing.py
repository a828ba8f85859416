"""Routing that was chosen for a model goes where its weights go, and comes back."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import _hub
from timm.utils import ModelEmaV3

import vmoe_torch
from tests.models.test_timm_contract import writes_arguments
from vmoe_torch.budget import LayerSetting, set_budget
from vmoe_torch.checkpoints import convert, export_original, load_original
from vmoe_torch.evaluate import count_flops
from vmoe_torch.parallel import export_safetensors

SIZE = {"img_size": 32, "num_classes": 5}


def made(name="test_vmoe", **changes):
    model = timm.create_model(name, **{**SIZE, **changes}).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def chosen(**changes):
    """A model with a routing of its own in one layer, and another in all."""
    model = made(**changes)
    vmoe_torch.set_routing(model, layers=["blocks.1.mlp"], num_selected_experts=1)
    vmoe_torch.set_routing(model, eval_capacity_factor=0.5, batch_priority=False)
    return model


def routing_of(model):
    return [layer.routing() for layer in vmoe_torch.moe_layers(model).values()]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model, other):
    images = torch.randn(3, 3, 32, 32)
    assert routing_of(other) == routing_of(model)
    assert torch.equal(other.eval()(images), model(images))


@pytest.mark.parametrize("way", [lambda state: state, saved, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_state_dict_brings_the_chosen_routing(way):
    model, other = chosen(), made()
    state = model.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other.load_state_dict(way(state))
    same(model, other)
    # And goes on from there.
    third = made()
    third.load_state_dict(saved(other.state_dict()))
    same(model, third)


def test_a_wrapped_model_brings_it_too():
    model, other = chosen(), made()
    wrapped = torch.nn.ModuleDict({"module": other})
    wrapped.load_state_dict(torch.nn.ModuleDict({"module": model}).state_dict())
    same(model, other)


def test_a_state_dict_changes_nothing_that_was_not_chosen():
    explicit = {"num_selected_experts": 3, "capacity_factor": 0.7, "group_size": "image"}
    model, other = made(), made(**explicit)
    before = routing_of(other)
    other.load_state_dict(model.state_dict())
    assert routing_of(other) == before
    vmoe_torch.set_routing(model, num_selected_experts=2)
    other.load_state_dict(model.state_dict())
    # What it was made with, yet set: chosen.
    assert routing_of(other) == [{**layer, "num_selected_experts": 2} for layer in before]
    # A plain dict has no metadata.
    third = made(**explicit)
    third.load_state_dict(dict(chosen().state_dict()))
    assert routing_of(third) == before


def test_routing_that_a_load_brought_goes_with_the_next_load():
    model = made()
    plain = routing_of(model)
    model.load_state_dict(chosen().state_dict())
    assert routing_of(model) != plain
    model.load_state_dict(made().state_dict())
    assert routing_of(model) == plain
    # What was set by hand stays.
    model.load_state_dict(chosen().state_dict())
    vmoe_torch.set_routing(model, batch_priority=False)
    model.load_state_dict(made().state_dict())
    assert routing_of(model) == [{**layer, "batch_priority": False} for layer in plain]


def test_routing_is_saved_as_it_is_set_at_that_moment():
    model = made()
    with vmoe_torch.routing(model, num_selected_experts=1):
        inside = saved(model.state_dict())
    outside = saved(model.state_dict())
    other, third = made(), made()
    other.load_state_dict(inside)
    third.load_state_dict(outside)
    assert {layer["num_selected_experts"] for layer in routing_of(other)} == {1}
    assert {layer["num_selected_experts"] for layer in routing_of(third)} == {2}
    assert not any(layer.chosen_routing() for layer in vmoe_torch.moe_layers(model).values())


def test_a_routing_that_does_not_fit_is_an_error():
    model = made(num_experts=4)
    state = model.state_dict()
    state._metadata["blocks.3.mlp"]["vmoe_routing"] = {"num_selected_experts": 9}
    other = made()
    before = routing_of(other)
    with pytest.raises(RuntimeError, match=r"routing of blocks\.3\.mlp: num_selected_experts must be in 1\.\."):
        other.load_state_dict(state)
    assert routing_of(other) == before
    state._metadata["blocks.3.mlp"]["vmoe_routing"] = {"speed": 9}
    with pytest.raises(RuntimeError, match=r"routing of blocks\.3\.mlp: .*speed"):
        other.load_state_dict(state)


def test_routing_comes_with_the_weights_of_its_layer_only():
    state = chosen().state_dict()
    for name in [name for name in state if not name.startswith("head.")]:
        del state[name]
    other = made()
    before = routing_of(other)
    other.load_state_dict(state, strict=False)
    assert routing_of(other) == before


def test_a_moving_average_and_a_copy_keep_it():
    model = chosen()
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)
    other = made()
    other.load_state_dict(saved(average.module.state_dict()))
    same(model, other)
    third = made()
    third.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
    same(model, third)


@writes_arguments
@pytest.mark.parametrize("safe", [True, False])
def test_timms_folder_brings_it(tmp_path, safe):
    model = chosen()
    timm.models.save_for_hf(model, tmp_path / "a", safe_serialization=safe)
    args = json.loads((tmp_path / "a/config.json").read_text())["model_args"]
    assert args["num_selected_experts"] == {"blocks.1.mlp": 1, "blocks.3.mlp": 2, "blocks.5.mlp": 2}
    loaded = timm.create_model(f"local-dir:{tmp_path}/a", pretrained=True)
    same(model, loaded)
    # A second time, and into a state dict.
    timm.models.save_for_hf(loaded, tmp_path / "b", safe_serialization=safe)
    same(model, timm.create_model(f"local-dir:{tmp_path}/b", pretrained=True))
    other = made()
    other.load_state_dict(loaded.state_dict())
    same(model, other)


@writes_arguments
def test_arguments_of_create_model_come_before_what_was_saved(tmp_path):
    timm.models.save_for_hf(chosen(), tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_selected_experts=2)
    assert [layer["num_selected_experts"] for layer in routing_of(loaded)] == [2, 2, 2]
    assert [layer["eval_capacity_factor"] for layer in routing_of(loaded)] == [0.5, 0.5, 0.5]


@writes_arguments
def test_timms_record_forgets_a_routing_that_is_taken_back(tmp_path):
    model = made(num_selected_experts=3)
    with vmoe_torch.routing(model, num_selected_experts=1):
        # timm writes its record anew.
        model.set_input_size(img_size=(48, 48))
    timm.models.save_for_hf(model, tmp_path)
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert args["num_selected_experts"] == 3
    assert list(args["img_size"]) == [48, 48]


def test_our_folder_has_a_card_and_works_with_any_timm(tmp_path):
    model = chosen(embed_dim=32)
    vmoe_torch.save_for_hf(model, tmp_path / "tiny", safe_serialization=True)
    card = (tmp_path / "tiny/README.md").read_text()
    assert "import vmoe_torch" in card
    assert "`blocks.1.mlp`: K=1, capacity factor 0.5, position order" in card
    assert "`blocks.3.mlp`: K=2, capacity factor 0.5, position order" in card
    assert load_file(tmp_path / "tiny/model.safetensors").keys() == model.state_dict().keys()
    same(model, timm.create_model(f"local-dir:{tmp_path}/tiny", pretrained=True))
    (tmp_path / "tiny/README.md").write_text("mine")
    vmoe_torch.save_for_hf(model, tmp_path / "tiny")
    assert (tmp_path / "tiny/README.md").read_text() == "mine"
    with pytest.raises(TypeError, match=r"must be a VMoE that timm\.create_model made, got VisionTransformer"):
        vmoe_torch.save_for_hf(timm.create_model("vit_tiny_patch16_224"), tmp_path)


def test_what_is_pushed_has_the_card(monkeypatch):
    uploaded = {}

    class Api:
        repo_id = "someone/vmoe"

        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return self

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            uploaded["card"] = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
            uploaded["model"] = timm.create_model(f"local-dir:{folder_path}", pretrained=True)

    monkeypatch.setattr(_hub, "HfApi", Api)
    model = chosen()
    vmoe_torch.push_to_hf_hub(model, "someone/vmoe")
    same(model, uploaded["model"])
    assert "import vmoe_torch" in uploaded["card"]
    assert 'timm.create_model("hf-hub:someone/vmoe", pretrained=True)' in uploaded["card"]
    assert "`blocks.1.mlp`: K=1" in uploaded["card"]


def test_a_routing_per_layer_is_an_argument():
    layers = {"blocks.1.mlp": 1, "blocks.3.mlp": 3, "blocks.5.mlp": 2}
    model = made(num_selected_experts=layers, capacity_factor=dict.fromkeys(layers, 0.5), eval_capacity_factor=2.0)
    assert [layer["num_selected_experts"] for layer in routing_of(model)] == [1, 3, 2]
    assert {(layer["capacity_factor"], layer["eval_capacity_factor"]) for layer in routing_of(model)} == {(0.5, 2.0)}
    with pytest.raises(
        ValueError, match=r"num_selected_experts must be one value, or have one for each of blocks\.1\."
    ):
        made(num_selected_experts={"blocks.1.mlp": 1})
    with pytest.raises(ValueError, match=r"num_selected_experts must be in 1\.\.num_experts=4, got 7"):
        made(num_selected_experts={**layers, "blocks.5.mlp": 7})


def test_an_ensembles_members_keep_theirs(tmp_path):
    size = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 16}
    model = made("eee_s32_last2_e8", **size)
    vmoe_torch.set_routing(model, layers=["blocks.3.mlp.members.1"], num_selected_experts=2)
    other = made("eee_s32_last2_e8", **size)
    other.load_state_dict(model.state_dict())
    same(model, other)
    vmoe_torch.save_for_hf(model, tmp_path)
    same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))


def test_files_of_every_kind_bring_it(tmp_path):
    model = chosen()
    export_safetensors(model, tmp_path / "a.safetensors")
    export_original(model, tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "b.safetensors")
    export_original(tmp_path / "b.safetensors", tmp_path / "again")
    torch.save(model.state_dict(), tmp_path / "c.pt")
    for name in ("a.safetensors", "ckpt", "b.safetensors", "again", "c.pt"):
        other, third = made(), made()
        load_original(tmp_path / name, other)
        same(model, other)
        third.load_pretrained(str(tmp_path / name))
        same(model, third)
    # Written anew without a choice, nothing of the old one is left.
    export_original(made(), tmp_path / "ckpt")
    assert not (tmp_path / "ckpt.vmoe_torch.json").exists()
    other = made()
    load_original(tmp_path / "ckpt", other)
    assert routing_of(other) == routing_of(made())


def test_a_file_that_does_not_fit_changes_neither_weights_nor_routing(tmp_path):
    export_safetensors(chosen(), tmp_path / "a.safetensors")
    other = made(embed_dim=32)
    before, weights = routing_of(other), copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="must fit the model"):
        load_original(tmp_path / "a.safetensors", other)
    assert routing_of(other) == before
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())


def test_a_budgeted_model_costs_the_same_after_a_trip(tmp_path):
    model = made()
    data = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)]
    settings = [LayerSetting(k, factor) for k in (2, 1) for factor in (1.05, 0.25)]
    budget = set_budget(model, flops=0.85, data=data, settings=settings, rounds=1)
    vmoe_torch.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same(model, loaded)
    flops = [count_flops(each, data[0][0]).total for each in (model, loaded)]
    assert flops[0] == flops[1]
    # Taken back, the state dict says what is set again.
    budget.revert(model)
    loaded.load_state_dict(model.state_dict())
    assert routing_of(loaded) == routing_of(made())
