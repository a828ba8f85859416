"""Weights that a run begins with: from a run, from the original's files, from a dense model; adapted, or refused."""

from dataclasses import replace

import pytest
import timm
import torch

from tests.weights.test_golden_checkpoints import FOLDER
from vmoe_torch.checkpoints import convert, read_original
from vmoe_torch.train import build_model, load_model, train
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.determinism import seed_everything
from vmoe_torch.train.start import build_starting_model
from vmoe_torch.weights.grid import zoom_position

# What the golden checkpoints are of, at another resolution.
RELEASED = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "moe_layers": [1, 3],
    "num_experts": 4,
}
DENSE = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


@pytest.mark.parametrize("converted", [True, False])
def test_a_released_checkpoint_is_fine_tuned_at_another_resolution(converted, tmp_path):
    prefix = str(FOLDER / "params_1shard" / "ckpt")
    arrays = read_original(prefix)
    if converted:
        convert(prefix, tmp_path / "x.safetensors")
        prefix = str(tmp_path / "x.safetensors")
    model = build_starting_model(ModelConfig("vmoe_s32", checkpoint=prefix, kwargs=RELEASED), num_classes=3)
    assert torch.equal(model.head.weight, torch.zeros(3, 32))
    position = arrays["Encoder/posembed_input/pos_embedding"]
    assert torch.equal(model.pos_embed, zoom_position(position, model.pos_embed, (6, 6), 1))
    assert torch.equal(model.cls_token, arrays["cls"])
    assert torch.equal(model.blocks[1].mlp.fc1.weight, arrays["Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"].mT)


@pytest.mark.parametrize("drop_head", [False, True])
def test_the_head_of_as_many_classes_is_kept_or_dropped(drop_head):
    prefix = str(FOLDER / "params_1shard" / "ckpt")
    classes = read_original(prefix)["head/bias"].shape[0]
    config = ModelConfig(
        "vmoe_s32", checkpoint=prefix, drop_head=drop_head, kwargs={**RELEASED, "head_bias_init": -2.0}
    )
    model = build_starting_model(config, classes)
    assert bool((model.head.bias == -2).all()) == drop_head
    assert bool((model.head.weight == 0).all()) == drop_head


def test_a_run_begins_with_the_weights_of_another(tiny, tmp_path):
    first = train(tiny.override("schedule.updates=2", "schedule.warmup_epochs=0", "data.mixup=0"))
    source = f"model.checkpoint={tiny.run.output}"
    second = tiny.override(source, f"run.output={tmp_path}/second", "optim.lr=0", "schedule.updates=1")
    second = second.override("schedule.warmup_epochs=0")
    result = train(second.override("optim.weight_decay=0"))
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, first.ema.state_dict()[name]), name


def test_a_dense_run_becomes_sparse(tiny, tmp_path):
    dense = tiny.override(
        "model.name=vit_tiny_patch16_224",
        "schedule.updates=2",
        "schedule.warmup_epochs=0",
        "data.mixup=0",
        "optim.ema_decay=none",
    )
    dense = replace(dense, model=replace(dense.model, name="vit_tiny_patch16_224", kwargs=DENSE))
    trained = train(dense).model
    sparse = dense.override(
        f"model.checkpoint={tiny.run.output}",
        "model.upcycle.num_experts=4",
        "model.upcycle.moe_layers=[1]",
        f"run.output={tmp_path}/sparse",
    )
    begun = build_starting_model(sparse.model, 10)
    for expert in range(4):
        assert torch.equal(begun.blocks[1].mlp.fc1.weight[expert], trained.blocks[1].mlp.fc1.weight)
    assert torch.equal(begun.head.weight, trained.head.weight)
    result = train(sparse)
    # A finished run needs neither the dense weights nor their place.
    opened, _, _ = load_model(sparse.run.output)
    assert all(torch.equal(weight, result.model.state_dict()[name]) for name, weight in opened.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_other_models_adapt_their_head(name, tiny, tmp_path):
    kwargs = DENSE if name.startswith("vit") else {"in_chans": 1}
    weights = timm.create_model(name, num_classes=7, **kwargs).state_dict()
    path = tmp_path / "x.pt"
    torch.save({"format": 1, "config": {}, "class_names": [], "model": weights, "ema": None}, path)
    if name.startswith("vit"):
        kwargs = {**kwargs, "img_size": 42}
    model = build_starting_model(ModelConfig(name, checkpoint=str(path), kwargs=kwargs), 3)
    own, head = model.state_dict(), model.pretrained_cfg["classifier"]
    assert own[f"{head}.weight"].shape[0] == 3
    same = [key for key in own if not key.startswith((head, "pos_embed"))]
    assert all(torch.equal(own[key], weights[key]) for key in same)


def test_what_does_not_fit_is_refused(tiny, tmp_path):
    prefix = str(FOLDER / "params_1shard" / "ckpt")
    config = ModelConfig("vmoe_s32", checkpoint=prefix, kwargs={**RELEASED, "depth": 6})
    with pytest.raises(ValueError, match=r"must fit the model: blocks\.4"):
        build_starting_model(config, 3)
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=3, **DENSE).state_dict()
    torch.save({"format": 1, "config": {}, "class_names": [], "model": dense, "ema": None}, tmp_path / "dense.pt")
    sparse = {**DENSE, "moe_layers": [1], "num_experts": 4}
    sparse = ModelConfig("vmoe_s32", checkpoint=str(tmp_path / "dense.pt"), kwargs=sparse)
    with pytest.raises(ValueError, match=r"it has no router: of a dense model, vmoe_torch\.upcycle makes a V-MoE"):
        build_starting_model(sparse, 3)
    with pytest.raises(ValueError, match=r"checkpoint .*nowhere does not exist"):
        build_starting_model(ModelConfig(checkpoint=f"{tmp_path}/nowhere"), 3)
    with pytest.raises(ValueError, match=r"model\.upcycle of resnet18: model must have blocks with an mlp each"):
        build_model(ModelConfig("resnet18", upcycle={"num_experts": 4}), 3)
    with pytest.raises(ValueError, match=r"model\.upcycle of vit_tiny_patch16_224: .*unexpected keyword"):
        build_model(ModelConfig("vit_tiny_patch16_224", upcycle={"experts": 4}), 3)
    with pytest.raises(ValueError, match=r"parallel.materialize must be false with .* model.upcycle, got true"):
        tiny.override("parallel.fsdp=true", "parallel.materialize=true", "model.upcycle.num_experts=2").check()


def test_a_length_in_updates_ends_with_a_validation(tiny):
    result = train(tiny.override("schedule.updates=7", "schedule.warmup_updates=2", "schedule.name=linear"))
    assert result.finished
    # Five updates are an epoch.
    assert [(row["epoch"], row["update"]) for row in result.history] == [(1, 5), (2, 7)]


def test_moving_average_of_a_short_run_forgets_the_random_weights(tiny):
    run = ("schedule.warmup_epochs=0", "optim.ema_decay=0.9999", "data.mixup=0")

    def behind(*changes):
        """How far the average is behind the weights, as a share of all their way."""
        result = train(tiny.override(*run, f"run.output={tiny.run.output}{len(changes)}", *changes))
        seed_everything(tiny.run.seed)
        begin = build_model(tiny.model, 10).state_dict()["head.weight"]
        end, average = (model.state_dict()["head.weight"] for model in (result.model, result.ema))
        return ((average - end).norm() / (begin - end).norm()).item()

    # timm's average begins after the first update, and hardly moves from there.
    assert 2 * behind() < behind("optim.ema_warmup=no")
