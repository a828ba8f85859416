"""Weights into models and safetensors and back: the original's logits, every bit, and what loading adapts."""

import math

import numpy as np
import pytest
import torch
from timm.models import adapt_input_conv

from tests.conftest import golden_arrays, relative_error
from tests.models.test_golden_models import golden_model
from tests.weights.test_golden_checkpoints import FOLDER, VARIANTS, expected, raw
from vmoe_torch.checkpoints import (
    CheckpointError,
    convert,
    export_original,
    load_original,
    read_original,
    write_original,
)
from vmoe_torch.models.architecture import model_arguments
from vmoe_torch.models.position import zoom_position
from vmoe_torch.weights.adapt import adapt_channels
from vmoe_torch.weights.conversion import Origin, read_converted
from vmoe_torch.weights.names import from_original, to_original

PARAMS = [name for name in VARIANTS if name.startswith(("params", "unknown"))]


def _empty_model(**kwargs):
    """The tiny model that the files are of, with weights of its own."""
    _, want, model = golden_model("token_learned", **kwargs)
    torch.manual_seed(1)
    model.init_weights()
    torch.nn.init.normal_(model.head.weight)
    return want, model


@pytest.mark.parametrize("variant", PARAMS)
def test_logits_from_the_files_equal_the_original(variant):
    want, model = _empty_model()
    load_original(FOLDER / variant / "ckpt", model)
    logits = model.eval()(torch.from_numpy(want["inputs"]).permute(0, 3, 1, 2))
    assert relative_error(logits, want["logits"]) <= 1e-5


def test_parameters_of_a_train_state_are_loaded():
    _, model = _empty_model()
    load_original(FOLDER / "train_state" / "ckpt", model)
    want = expected("train_state")
    assert raw(model.cls_token.detach()) == want["params/cls"].tobytes()
    assert raw(model.head.weight.detach()) == want["params/head/kernel"].T.tobytes()


@pytest.mark.parametrize("variant", [*PARAMS, "train_state"])
def test_round_trip_through_safetensors_keeps_every_bit(variant, tmp_path):
    prefix = FOLDER / variant / "ckpt"
    convert(prefix, tmp_path / "a.safetensors", train_state=True)
    convert(prefix, tmp_path / "b.safetensors", train_state=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    export_original(tmp_path / "a.safetensors", tmp_path / "back" / "x", num_shards=2)
    got, want = read_original(str(tmp_path / "back" / "x")), read_original(str(prefix))
    assert got.keys() == want.keys()
    assert all(raw(got[name]) == raw(want[name]) and got[name].shape == want[name].shape for name in want)


def test_export_of_a_release_layout_gives_its_bytes(tmp_path):
    _, model = _empty_model()
    load_original(FOLDER / "params_1shard" / "ckpt", model)
    for source in ("model", "file"):
        convert(FOLDER / "params_1shard" / "ckpt", tmp_path / "x.safetensors")
        export_original(model if source == "model" else tmp_path / "x.safetensors", tmp_path / "ckpt")
        for name in ("ckpt.index", "ckpt.data-00000-of-00001"):
            assert (tmp_path / name).read_bytes() == (FOLDER / "params_1shard" / name).read_bytes()


@pytest.mark.parametrize("case", ["token_rep_cf4_bpr", "map_learned_rep", "gap_sincos_bpr", "all_dense"])
def test_every_parameter_of_a_model_goes_there_and_back(case, tmp_path):
    _, want, model = golden_model(case)
    export_original(model, tmp_path / "x")
    arrays = read_original(str(tmp_path / "x"))
    params = {name.removeprefix("params/"): a for name, a in want.items() if name.startswith("params/")}
    assert {name: raw(a) for name, a in arrays.items()} == {name: a.tobytes() for name, a in params.items()}
    heads = model.blocks[0].attn.num_heads
    again = to_original(from_original(params), heads)
    assert all(np.array_equal(again[name].numpy(), a) for name, a in params.items())


def test_converted_files_load_as_the_original_ones(tmp_path):
    _, model = _empty_model()
    convert(FOLDER / "train_state" / "ckpt", tmp_path / "x.safetensors", train_state=True)
    model.load_pretrained(str(tmp_path / "x.safetensors"))
    assert raw(model.cls_token.detach()) == expected("train_state")["params/cls"].tobytes()
    state, origin = read_converted(tmp_path / "x.safetensors")
    assert (origin.num_heads, origin.ensemble_size, origin.root) == (4, 1, "params/")
    assert "original/opt_state/2/mu/cls" in state


@pytest.mark.parametrize("case", ["zoom_7cls_to_12cls", "zoom_12cls_to_7cls", "zoom_7_to_12cls_targetarray"])
def test_positions_zoom_as_in_the_original(case):
    want = golden_arrays("initialization", case)
    target = torch.from_numpy(want["target"])
    grid = int((target.shape[1] - 1) ** 0.5)
    got = zoom_position(torch.from_numpy(want["source"]), target, (grid, grid), 1)
    assert relative_error(got, want["output"]) <= 1e-6


def test_positions_zoom_without_a_token_in_the_target():
    want = golden_arrays("initialization", "zoom_7cls_to_12cls")
    got = zoom_position(torch.from_numpy(want["source"]), torch.zeros(1, 144, 8), (12, 12), 0)
    assert relative_error(got, want["output"][:, 1:]) <= 1e-6
    with pytest.raises(ValueError, match="pos_embed must hold a square grid to be resized, got 12 positions"):
        zoom_position(torch.zeros(1, 12, 8), torch.zeros(1, 144, 8), (12, 12), 0)


def test_load_adapts_resolution_channels_and_classes():
    want = expected("params_1shard")
    _, _, other = golden_model("token_learned")
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "num_experts": 4}
    model = type(other)(img_size=48, in_chans=1, num_classes=3, moe_layers=(1, 3), **kwargs)
    head = model.head.weight.detach().clone()
    model.load_pretrained(str(FOLDER / "params_1shard" / "ckpt"))
    kernel = torch.from_numpy(want["embedding/kernel"]).permute(3, 2, 0, 1)
    assert relative_error(model.patch_embed.proj.weight, kernel.sum(1, keepdim=True)) <= 1e-6
    assert model.pos_embed.shape == (1, 37, 32)
    position = want["Encoder/posembed_input/pos_embedding"]
    # The class token is copied, and corners stay where they are.
    for ours, theirs in ((0, 0), (1, 1), (6, 4), (31, 13), (36, 16)):
        assert np.allclose(model.pos_embed[0, ours].detach(), position[0, theirs], atol=1e-6)
    assert torch.equal(model.head.weight, head)
    features = type(other)(img_size=32, num_classes=0, moe_layers=(1, 3), **kwargs)
    features.load_pretrained(str(FOLDER / "params_1shard" / "ckpt"))
    assert torch.equal(features.norm.weight, torch.from_numpy(want["Encoder/encoder_norm/scale"]))


@pytest.mark.parametrize("in_chans", [1, 2, 3, 7])
def test_channels_adapt_as_in_timm(in_chans):
    kernel = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(adapt_channels(kernel, in_chans), adapt_input_conv(in_chans, kernel))
    grey = kernel[:, :1]
    assert torch.equal(adapt_channels(grey, 4), grey.expand(-1, 4, -1, -1) / 4)


def test_load_refuses_what_does_not_fit_and_changes_nothing():
    _, model = _empty_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="attention must have one number of heads"):
        model.load_pretrained(str(FOLDER / "subchunks" / "ckpt"))
    _, deeper = _empty_model()
    deeper.blocks.append(deeper.blocks[0])
    with pytest.raises(ValueError, match=r"ckpt must fit the model: blocks\.4\.attn\.proj\.bias is missing"):
        deeper.load_pretrained(str(FOLDER / "params_1shard" / "ckpt"))
    with pytest.raises(CheckpointError, match="must be a readable safetensors file"):
        model.load_pretrained(str(FOLDER / "none.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_head_of_a_pre_logits_layer_is_not_loaded_without_it(tmp_path):
    _, _, model = golden_model("token_rep_cf4_bpr")
    export_original(model, tmp_path / "x")
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "num_experts": 4}
    plain = type(model)(img_size=32, num_classes=model.num_classes, moe_layers=(1, 3), **kwargs)
    with pytest.raises(ValueError, match=r"pre_logits\.0\.weight is not in the model, but its head is"):
        plain.load_pretrained(str(tmp_path / "x"))
    plain.reset_classifier(model.num_classes + 1)
    plain.load_pretrained(str(tmp_path / "x"))
    assert torch.equal(plain.norm.weight, model.norm.weight)


def test_conversion_refuses_unknown_parameters():
    with pytest.raises(ValueError, match="one of the original's, got 'Encoder/encoderblock_0/Mlp/Dense_2/kernel'"):
        from_original({"Encoder/encoderblock_0/Mlp/Dense_2/kernel": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"it has none for 'blocks\.0\.ls1\.gamma'"):
        to_original({"blocks.0.ls1.gamma": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="num_heads must be given"):
        export_original({"cls_token": torch.zeros(1, 1, 2)}, "x")


@pytest.mark.parametrize(
    ("path", "array", "said"),
    [
        ("cls", torch.zeros(32), "'cls' must have 3 dims, got \\(32,\\)"),
        ("cls", torch.zeros(1, 1, 32, dtype=torch.int64), "'cls' must be of floating point, got torch.int64"),
        ("head/kernel", torch.zeros(()), "'head/kernel' must have 2 dims, got \\(\\)"),
        ("embedding/kernel", torch.zeros(3, 4), "'embedding/kernel' must have 4 dims"),
        ("Encoder/encoderblock_1/Moe/Router/dense/kernel", torch.zeros(3), "must have 2 or 3 dims"),
        ("Encoder/encoderblock_1/Moe/Mlp/Dense_0/bias", torch.zeros(64), "must have 2 dims"),
        ("Encoder/encoderblock_0/SelfAttention/key/kernel", torch.zeros(31, 4, 8), "must be of one width"),
    ],
)
def test_parameters_of_another_shape_or_kind_name_file_and_leaf(path, array, said, tmp_path):
    arrays = read_original(str(FOLDER / "params_1shard" / "ckpt"))
    write_original(tmp_path / "x", arrays | {path: array})
    with pytest.raises(CheckpointError, match=f"{tmp_path}/x: .*{said}"):
        convert(tmp_path / "x", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_patch_embedding_of_no_pixels_is_refused(tmp_path):
    _, model = _empty_model()
    arrays = read_original(str(FOLDER / "params_1shard" / "ckpt"))
    for shape in ((0, 0, 3, 32), (8, 8, 0, 32)):
        write_original(tmp_path / "x", arrays | {"embedding/kernel": torch.zeros(shape)})
        with pytest.raises(ValueError, match=r"x: patch_embed.proj.weight must be \(D, C, P, P\), got \(32,"):
            load_original(tmp_path / "x", model)


def test_dtypes_that_safetensors_lacks_are_named(tmp_path):
    arrays = read_original(str(FOLDER / "train_state" / "ckpt"))
    write_original(tmp_path / "x", arrays | {"opt_state/z": torch.zeros(1, dtype=torch.complex128)})
    convert(tmp_path / "x", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"dtypes must be those of safetensors, got torch\.complex128"):
        convert(tmp_path / "x", tmp_path / "y.safetensors", train_state=True)


def test_hidden_widths_survive_the_ratio():
    """488 / 56 * 56 is below 488."""
    state = {"patch_embed.proj.weight": torch.zeros(56, 3, 8, 8), "blocks.0.mlp.fc1.weight": torch.zeros(488, 56)}
    ratio = model_arguments(state, Origin(7))["mlp_ratio"]
    assert int(56 * (488 / 56)) == 487
    assert int(56 * ratio) == 488
    pairs = [(hidden, width) for width in range(8, 2049, 72) for hidden in range(8, 8193, 24)]
    assert all(int(width * math.nextafter(hidden / width, math.inf)) == hidden for hidden, width in pairs)
