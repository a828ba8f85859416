"""Options of the original beside those of the golden models: normed queries and keys, temperature, positions' size."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import vmoe_torch
from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.position import sincos2d
from vmoe_torch.weights.exporting import export_original
from vmoe_torch.weights.grid import zoom_position
from vmoe_torch.weights.names import from_original, to_original
from vmoe_torch.weights.sources import read_weights

HEADS, DEPTH, WIDTH = 2, 2, 16


def _model(**kwargs) -> vmoe_torch.VMoE:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}
    options |= {"num_experts": 2, "num_classes": 3, "qk_norm": True, "class_token": False, "global_pool": "map"}
    model = vmoe_torch.VMoE(**options | kwargs).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As the original's: norms of queries and keys without a bias.
            if not name.endswith(("q_norm.bias", "k_norm.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _flax_attention(arrays: dict[str, Tensor], name: str, queries: Tensor, inputs: Tensor) -> Tensor:
    """flax.linen.MultiHeadDotProductAttention with normalize_qk, written out."""

    def project(part: str, x: Tensor) -> Tensor:
        return torch.einsum("bld,dhe->blhe", x, arrays[f"{name}/{part}/kernel"]) + arrays[f"{name}/{part}/bias"]

    def norm(part: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * arrays[f"{name}/{part}/scale"]

    query, key = norm("query_ln", project("query", queries)), norm("key_ln", project("key", inputs))
    weights = torch.einsum("bqhe,bkhe->bhqk", query / math.sqrt(query.shape[-1]), key).softmax(-1)
    out = torch.einsum("bhqk,bkhe->bqhe", weights, project("value", inputs))
    return torch.einsum("bqhe,hed->bqd", out, arrays[f"{name}/out/kernel"]) + arrays[f"{name}/out/bias"]


def test_normed_queries_and_keys_are_read_run_and_written_back():
    model = _model()
    arrays = to_original(model.state_dict(), HEADS)
    names = [name for name in arrays if "query_ln" in name or "key_ln" in name]
    assert len(names) == 2 * (DEPTH + 1)
    assert all(name.endswith("/scale") and arrays[name].shape == (WIDTH // HEADS,) for name in names)
    state = from_original(arrays)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    got = model.blocks[1].attn(x)
    assert relative_error(got, _flax_attention(arrays, "Encoder/encoderblock_1/SelfAttention", x, x).detach()) <= 1e-12
    probe = arrays["MapHead/probe"].expand(2, -1, -1)
    pooled = _flax_attention(arrays, "MapHead/MultiHeadDotProductAttention", probe, x)
    pooled = (pooled + model.attn_pool.mlp(model.attn_pool.norm(pooled)))[:, 0]
    assert relative_error(model.attn_pool(x), pooled.detach()) <= 1e-12


def test_a_checkpoint_with_normed_queries_and_keys_travels(tmp_path):
    model = _model().float()
    export_original(model, tmp_path / "original")
    again = open_weights(read_weights(tmp_path / "original"))[0].eval()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with vmoe_torch.routing(again, capacity_factor=8.0), vmoe_torch.routing(model, capacity_factor=8.0):
        assert torch.equal(again(x), model(x))
    np.savez(tmp_path / "original.npz", **{k: v.numpy() for k, v in to_original(model.state_dict(), HEADS).items()})
    other = _model().float()
    other.load_pretrained(str(tmp_path / "original.npz"))
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())


def test_what_the_original_cannot_hold_is_refused():
    model = _model()
    with torch.no_grad():
        model.blocks[0].attn.q_norm.bias.add_(1.0)
    with pytest.raises(ValueError, match=r"^blocks\.0\.attn\.q_norm\.bias must be 0, as the original's norms"):
        to_original(model.state_dict(), HEADS)
    with pytest.raises(ValueError, match=r"path must be one of the original's, got 'Encoder/.*/query_ln/bias'"):
        from_original({"Encoder/encoderblock_0/SelfAttention/query_ln/bias": torch.zeros(8)})


def test_pooling_is_normed_only_with_the_blocks():
    assert isinstance(_model(qk_norm=False).attn_pool.q_norm, torch.nn.Identity)
    assert _model(class_token=True, global_pool="token").attn_pool is None


def test_temperature_reaches_the_positions():
    def original(temperature: float) -> Tensor:
        y, x = (each.flatten() for each in np.mgrid[:2, :3].astype(np.float64))
        omega = 1.0 / temperature ** (np.arange(WIDTH // 4) / (WIDTH // 4 - 1))
        x, y = np.outer(x, omega), np.outer(y, omega)
        return torch.from_numpy(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], -1)[None])

    options = {"img_size": (32, 48), "pos_embed": "sincos2d"}
    model = _model(**options, pos_embed_temperature=100.0)
    model.init_weights()
    torch.testing.assert_close(model.pos_embed.double(), original(100.0), rtol=0, atol=1e-7)
    model.set_input_size((48, 32))
    model.set_input_size((32, 48))
    torch.testing.assert_close(model.pos_embed.double(), original(100.0), rtol=0, atol=1e-7)
    model = timm.create_model("test_vmoe", img_size=32, pos_embed="sincos2d")
    assert torch.equal(model.pos_embed, sincos2d(2, 2, 64))
    for value in (math.nan, 0.0, -1.0, "1"):
        with pytest.raises(ValueError, match=r"^pos_embed_temperature must be above 0, got "):
            _model(**options, pos_embed_temperature=value)
    with pytest.raises(ValueError, match=r"^pos_embed_temperature must be 10000.0 unless pos_embed is 'sincos2d'"):
        _model(pos_embed_temperature=100.0)


ZOOMS = golden_cases("initialization", lambda config: "target_grid" in config)


@pytest.mark.parametrize("case", ZOOMS)
def test_every_golden_zoom_is_exact_to_a_rounding(case):
    config, want = manifest("initialization")[case]["config"], golden_arrays("initialization", case)
    grid, prefix = config["target_grid"], int(config["target_cls"])
    got = zoom_position(torch.from_numpy(want["source"]), torch.from_numpy(want["target"]), (grid, grid), prefix)
    assert relative_error(got, want["output"]) <= 1.2e-7


@pytest.mark.parametrize("grids", [(16, (32, 32)), (7, (7, 7)), (24, (14, 14)), (7, (5, 13)), (5, (1, 9)), (1, (4, 4))])
@pytest.mark.parametrize("tokens", [0, 1])
def test_zoom_is_exact_to_a_rounding(grids, tokens):
    side, (height, width) = grids
    source = torch.randn(1, tokens + side * side, 8)
    target = torch.zeros(1, tokens + height * width, 8)
    got = zoom_position(source, target, (height, width), tokens)
    image = source[0, tokens:].double().view(side, side, 8)

    def lines(count: int) -> Tensor:
        """(count, side): the weights of a bilinear resize, corners on corners."""
        place = torch.arange(count, dtype=torch.float64) * (side - 1) / max(count - 1, 1)
        return (1 - (place.unsqueeze(1) - torch.arange(side, dtype=torch.float64)).abs()).clamp(min=0)

    want = torch.einsum("ya,xb,abd->yxd", lines(height), lines(width), image).reshape(-1, 8)
    assert relative_error(got[0, tokens:], want) <= 6e-8
    assert torch.equal(got[:, :tokens], source[:, :tokens])
