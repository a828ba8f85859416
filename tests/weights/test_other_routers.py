"""Weights of one router in a model of another, and what the shapes of plain state dicts tell of routers and widths."""

import argparse

import pytest
import timm
import torch

import vmoe_torch
from tests.tiny import randomized
from vmoe_torch.commands.sources import open_model
from vmoe_torch.models.architecture import shape_arguments
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.start import build_starting_model
from vmoe_torch.weights.names import to_original

SIZE = {"img_size": 32, "num_classes": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
THRESHOLD = {"router": "threshold", "mean_selected_experts": 1.4}


def made(name="test_vmoe", **changes):
    """Random weights, and thresholds that cut."""
    model = randomized(timm.create_model(name, **{**SIZE, **changes}))
    for key, buffer in model.named_buffers():
        if key.endswith("thresholds"):
            buffer.fill_(0.3)
    return model


def written(model, path):
    """A plain dict, which says nothing of the model."""
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, path)
    return str(path)


def loaded(path, name, changes):
    model = timm.create_model(name, **SIZE, **changes)
    model.load_pretrained(path)
    return model


def named(path, name, changes):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **SIZE, **changes)


def begun(path, name, changes):
    return build_starting_model(ModelConfig(name, checkpoint=path, kwargs={"img_size": 32, **changes}), 3)


@pytest.mark.parametrize("door", [loaded, named, begun])
def test_top_experts_weights_fit_a_threshold_model(door, tmp_path):
    source = made()
    model = door(written(source, tmp_path / "x.pt"), "test_vmoe", THRESHOLD).eval()
    assert {layer.mean_selected_experts for layer in vmoe_torch.moe_layers(model).values()} == {1.4}
    vmoe_torch.set_routing(model, mean_selected_experts=None)
    assert torch.equal(model(IMAGES), source(IMAGES))


def test_thresholds_that_a_load_does_not_bring_begin_anew(tmp_path):
    model = made(**THRESHOLD)
    model.load_pretrained(written(made(), tmp_path / "x.pt"))
    assert not any(layer.router.thresholds.any() for layer in vmoe_torch.moe_layers(model).values())
    # A router that is not there is still missed, and so are its thresholds.
    with pytest.raises(ValueError, match=r"mlp\.router\.thresholds is missing; .*mlp\.router\.weight is missing"):
        model.load_pretrained(written(made(moe_layers=[]), tmp_path / "y.pt"))


@pytest.mark.parametrize("source", [{}, THRESHOLD])
def test_members_of_a_threshold_ensemble_take_a_models_experts(source, tmp_path):
    small = {"embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 16, "representation_size": 0, "num_experts": 4}
    path = written(made("vmoe_s32", moe_layers="last2", **small, **source), tmp_path / "x.pt")
    model = loaded(path, "eee_s32_last2_e8", {**small, "router": "threshold", "mean_selected_experts": 0.8})
    assert len(vmoe_torch.moe_layers(model)) == 4
    assert model.eval()(IMAGES).isfinite().all()


def test_every_member_of_an_ensemble_takes_the_shared_expert_whole(tmp_path):
    small = {"embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 16, "representation_size": 0, "num_experts": 4}
    small["shared_expert_hidden"] = 0.5
    own = made("vmoe_s32", moe_layers="last2", **small)
    model = loaded(written(own, tmp_path / "x.pt"), "eee_s32_last2_e8", small)
    shared = own.blocks[3].mlp.shared_expert
    for member in model.blocks[3].mlp.members:
        assert torch.equal(member.shared_expert.fc1.weight, shared.fc1.weight)
        assert torch.equal(member.shared_expert.fc2.weight, shared.fc2.weight)
    weights = {member.shared_expert.fc1.weight.data_ptr() for member in model.blocks[3].mlp.members}
    assert len(weights) == 2


HALF = {"expert_hidden": 0.5}
SOFT = {"router": "soft", "slots_per_expert": 2}
UNEVEN = {"num_experts": {"blocks.1.mlp": 4, "blocks.3.mlp": 2, "blocks.5.mlp": 4}}


@pytest.mark.parametrize(
    "changes",
    [HALF, THRESHOLD, SOFT, SOFT | HALF, THRESHOLD | HALF, UNEVEN | HALF, HALF | {"moe_layers": "every1"}],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.parametrize("place", ["test_vmoe=", ""])
def test_shapes_tell_router_and_width(changes, place, tmp_path):
    model = made(**changes)
    opened = open_model(place + written(model, tmp_path / "x.pt")).model
    layers = vmoe_torch.moe_layers(opened)
    assert {layer.router_type for layer in layers.values()} == {changes.get("router", "top_experts")}
    assert [layer.expert_hidden for layer in layers.values()] == [
        layer.expert_hidden for layer in vmoe_torch.moe_layers(model).values()
    ]
    if "mean_selected_experts" in changes:
        # Which no shape tells.
        vmoe_torch.set_routing(opened, mean_selected_experts=1.4)
    assert torch.equal(opened(IMAGES), model(IMAGES))


def test_a_router_that_is_the_models_own_comes_first(tmp_path):
    model = made("test_soft_moe")
    assert "test_soft_moe, by the shapes" in open_model(written(model, tmp_path / "x.pt")).about


@pytest.mark.parametrize(
    "changes",
    [
        {},
        HALF,
        {"expert_hidden": [1.0, 1.0, 0.5, 0.0]},
        {"expert_hidden": [1.0, 1.0, 0.5, 0.5]},
        SOFT,
        {"router": "threshold"},
    ],
    ids=str,
)
def test_shapes_tell_an_ensembles_too(changes):
    size = {"embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 16, "representation_size": 0}
    model = timm.create_model("eee_s32_last2_e8", device="meta", num_experts=4, **SIZE, **size, **changes)
    state = model.state_dict()
    found = shape_arguments("eee_s32_last2_e8", state)
    again = timm.create_model("eee_s32_last2_e8", device="meta", **{**size, **found})
    shapes = {name: value.shape for name, value in again.state_dict().items()}
    assert shapes == {name: value.shape for name, value in state.items()}
    assert ("expert_hidden" in found) == ("expert_hidden" in changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (SOFT, r"^the original must have a parameter for every one of ours"),
        ({"expert_hidden": [1.0, 1.0, 0.5, 0.5]}, r"mlp\.fc1\.weight must be of one shape in all members, got \("),
    ],
    ids=["soft", "sizes"],
)
def test_an_ensemble_that_the_original_has_not_is_told(changes, text):
    size = {"embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 16, "num_experts": 4}
    state = timm.create_model("eee_s32_last2_e8", device="meta", **SIZE, **size, **changes).state_dict()
    with pytest.raises(ValueError, match=text):
        to_original(state, num_heads=2, ensemble_size=2)


def test_timms_script_may_leave_slots_to_a_capacity(tmp_path):
    changes = {"router": "soft", "capacity_factor": 2.0}
    model = made(**changes)
    args = {"model": "test_vmoe", "img_size": 32, "num_classes": 3, "model_kwargs": changes}
    torch.save({"state_dict": dict(model.state_dict()), "args": argparse.Namespace(**args)}, tmp_path / "last.pth.tar")
    opened = open_model(tmp_path).model
    assert torch.equal(opened(IMAGES), model(IMAGES))
