"""Every recipe loads, describes a model that can be built, and runs: two updates, made tiny."""

import importlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vmoe_torch import moe_layers
from vmoe_torch.checkpoints import CheckpointError
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import build_model, train
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.start import load_start

# Classes, image size, patch, width, blocks with experts, capacity in training and in evaluation, tanh layer.
S, B = (32, 512), (16, 768)
EVERY2 = (1, 3, 5, 7, 9, 11)
PAPER = {
    "pretrain_in1k_light1": (1000, 224, *S, (5, 7), 1.05, 4.0, True),
    "pretrain_in1k_medium": (1000, 224, *S, (5, 7), 1.05, 4.0, True),
    "pretrain_in21k": (21_843, 224, *B, EVERY2, 1.05, 1.05, False),
    "finetune_in1k_384": (1000, 384, *S, (5, 7), 1.5, 1.5, False),
    "finetune_cifar10": (10, 128, *B, EVERY2, 1.5, 1.5, False),
    "finetune_upcycled": (1000, 384, *B, EVERY2, 1.5, 1.5, False),
}
TINY = (
    "model.pretrained=false",
    "model.checkpoint=none",
    "model.kwargs.img_size=32",
    "model.kwargs.patch_size=16",
    "model.kwargs.embed_dim=32",
    "model.kwargs.depth=4",
    "model.kwargs.num_heads=2",
    "data.batch_size=4",
    "data.workers=0",
    "schedule.updates=2",
    "schedule.warmup_updates=1",
    "run.device=cpu",
    "run.precision=float32",
    "run.checkpoint_every=none",
    "run.tensorboard=false",
    "run.progress=false",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 8 training and 4 validation images in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", PAPER)
def test_recipe_describes_its_model(name):
    config = load_recipe(name).override("data.root=somewhere")
    config.check()
    classes, side, patch, width, sparse, capacity, eval_capacity, tanh = PAPER[name]
    with torch.device("meta"):
        model = build_model(config.model, classes)
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == ((side, side), (patch, patch))
    assert model.head.weight.shape == (classes, width)
    assert ("pre_logits.0.weight" in model.state_dict()) == tanh
    layers = moe_layers(model)
    assert tuple(layers) == tuple(f"blocks.{block}.mlp" for block in sparse)
    for layer in layers.values():
        assert (layer.num_experts, layer.num_selected_experts, layer.group_size) == (8, 2, 8)
        assert (layer.capacity_factor, layer.eval_capacity_factor) == (capacity, eval_capacity)
        assert layer.expert_drop == (0.2 if "in1k_" in name and name.startswith("pretrain") else 0)
        assert layer.renormalize_gates == (name == "finetune_upcycled")


@pytest.mark.parametrize("name", [*PAPER, "pretrain_soft_moe"])
def test_recipe_runs(name, photos, tmp_path):
    config = load_recipe(name).override(*TINY, f"data.root={photos}", f"run.output={tmp_path / name}")
    result = train(config)
    assert result.finished
    assert result.updates == 2
    assert np.isfinite(result.history[-1]["val_loss"])


@pytest.mark.parametrize("name", PAPER)
def test_recipe_says_what_it_takes_and_gives(name):
    text = importlib.import_module(f"vmoe_torch.recipes.{name}").__doc__
    for word in ("Command: ", f"--recipe {name} ", "ardware", "Cost: ", "Result: not yet run."):
        assert word in text


def test_recipes_begin_with_released_models(monkeypatch, tmp_path):
    for name in ("finetune_in1k_384", "finetune_cifar10"):
        config = load_recipe(name).model
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        assert timm.get_pretrained_cfg(config.checkpoint).custom_load
        with pytest.raises(CheckpointError, match="must be in the cache when HF_HUB_OFFLINE is set"):
            load_start(build_model(ModelConfig("test_vmoe"), 10), config.checkpoint)
