"""What a user names as a model and as images, and the errors for what is neither."""

import gzip
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

import vmoe_torch
from tests.conftest import golden_arrays, relative_error
from tests.weights.test_golden_checkpoints import FOLDER
from vmoe_torch.checkpoints import convert
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import open_model
from vmoe_torch.data import FashionMnist
from vmoe_torch.data.idx import write_idx

GREY = torch.zeros(1, 1, 28, 28)


@pytest.mark.parametrize("place", ["", "checkpoints/update_00000002"])
def test_a_run_is_a_model(run_folder, place):
    source = open_model(run_folder / place)
    assert not source.model.training
    assert (source.mode, source.class_names[9]) == ("L", "ankle boot")
    assert source.config.model.kwargs["embed_dim"] == 32
    image, label = open_images(source, "fashion_mnist")[0]
    assert source.model(source.transform(image)[None]).shape == (1, 10)
    assert label == FashionMnist("test")[0][1]


@pytest.mark.parametrize("converted", [True, False])
def test_a_checkpoint_of_the_original_tells_its_model(converted, tmp_path):
    place = FOLDER / "params_1shard" / "ckpt"
    if converted:
        convert(place, tmp_path / "x.safetensors")
        place = tmp_path / "x.safetensors"
    source = open_model(place)
    want = golden_arrays("models", "token_learned")
    # The files do not hold the routing.
    vmoe_torch.set_routing(source.model, group_size=4, capacity_factor=1.05, batch_priority=False)
    logits = source.model(torch.from_numpy(want["inputs"]).permute(0, 3, 1, 2))
    assert relative_error(logits, want["logits"]) <= 1e-5
    assert (source.mode, source.class_names, source.config) == ("RGB", None, None)
    side = source.model.patch_embed.img_size
    assert source.transform(Image.new("RGB", (100, 60))).shape == (3, *side)


def test_an_ensemble_tells_its_model_and_gives_log_probabilities(tmp_path):
    ensemble = timm.create_model(
        "eee_s32_last2_e8", embed_dim=32, depth=2, num_heads=2, moe_layers="last1", num_classes=5, img_size=64
    )
    torch.nn.init.normal_(ensemble.head.weight)
    vmoe_torch.checkpoints.export_original(ensemble, tmp_path / "eee")
    source = open_model(tmp_path / "eee")
    assert source.model.ensemble_size == 2
    images = torch.randn(4, 3, 64, 64)
    vmoe_torch.set_routing(ensemble, group_size="image")
    vmoe_torch.set_routing(source.model, group_size="image")
    # The released ones round what goes into the experts.
    assert relative_error(source.model(images).exp(), ensemble.eval()(images)) < 1e-2


def test_a_pretrained_timm_model_knows_imagenet(monkeypatch):
    monkeypatch.setattr(timm, "is_model_pretrained", lambda name: True)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    source = open_model("test_vmoe")
    assert source.class_names[0] == "n01440764"
    assert source.transform(Image.new("RGB", (300, 200))).shape == (3, 160, 160)


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must be a run folder, a checkpoint .*name, got 'runs/x'"):
        open_model("runs/x")
    with pytest.raises(ValueError, match="must have pretrained weights to be used by its name, got 'vmoe_s32'"):
        open_model("vmoe_s32")
    with pytest.raises(ValueError, match="must hold a checkpoint, got none"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint .*none\.pt does not exist"):
        open_model(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="must be a readable safetensors file"):
        open_model(tmp_path / "none.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"weights of vmoe_b16_e8 cannot be had: .*must be in the cache"):
        open_model("vmoe_b16_e8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device must be cpu or auto, as PyTorch sees no CUDA device, got cuda:0"):
        open_model("vmoe_s32", "cuda:0")


def test_labels_follow_the_names_of_the_model(run_folder, image_folder):
    source = open_model(run_folder)
    images = open_images(source, image_folder)
    assert len(images) == 12
    assert images.class_names == source.class_names
    assert [label for _, label in images] == images.labels().tolist()
    assert set(images.labels()) == {1, 5, 8}
    assert images[0][0].mode == "L"
    own = open_images(source, image_folder, "train", own_labels=True)
    assert own.class_names == ("bag", "sandal", "trouser")
    assert {label for _, label in own} == {0, 1, 2}
    assert len(open_images(source, image_folder, ".")) == 24


def test_images_are_found_where_they_are(run_folder, image_folder, tmp_path):
    source = open_model(run_folder)
    assert len(open_images(source, image_folder / "val")) == 12
    assert len(open_images(source, "fashion_mnist", "train")) == 9000
    data = FashionMnist("test")
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", data.images[:7])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", data.labels[:7].astype("uint8"))
    images = open_images(source, tmp_path)
    assert len(images) == 7
    assert images[3][1] == data.labels[3]


def test_classes_that_are_not_the_models_are_refused(run_folder, image_folder, tmp_path):
    source = open_model(run_folder)
    (tmp_path / "hat").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "hat" / "0.png")
    with pytest.raises(ValueError, match="must be among the 10 expected, got hat too"):
        open_images(source, tmp_path)
    nameless = replace(source, class_names=None)
    with pytest.raises(ValueError, match="must have as many classes as the model, 10, got 3"):
        open_images(nameless, image_folder)
    with pytest.raises(ValueError, match=r"split must be a folder in .*, got 'dev'"):
        open_images(source, image_folder, "dev")
    with pytest.raises(ValueError, match="image folder nowhere does not exist"):
        open_images(source, "nowhere")


def test_data_sets_of_timm(run_folder, tmp_path):
    source = open_model(run_folder)
    data = FashionMnist("test")
    for prefix, count in (("train", 3), ("t10k", 5)):
        folder = tmp_path / "FashionMNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for kind, array in (("images-idx3", data.images), ("labels-idx1", data.labels.astype("uint8"))):
            write_idx(folder / "x.gz", array[:count])
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(gzip.decompress((folder / "x.gz").read_bytes()))
    images = open_images(source, f"torch/fashion_mnist={tmp_path}")
    assert len(images) == 5
    assert [label for _, label in images] == data.labels[:5].tolist()
    with pytest.raises(ValueError, match=r"data set torch/cifar10 in .* cannot be opened: "):
        open_images(source, f"torch/cifar10={tmp_path}")
