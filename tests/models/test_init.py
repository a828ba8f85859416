"""Initialisation against statistics of the original's initialisers."""

import json

import pytest
import torch

import vmoe_torch
from tests.conftest import GOLDEN
from vmoe_torch.weights.names import from_original

STATS = json.loads((GOLDEN / "init_stats.json").read_text())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = STATS["config"]
    encoder = config["encoder"]
    return vmoe_torch.VMoE(
        img_size=32,
        patch_size=8,
        num_classes=config["num_classes"],
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        representation_size=config["representation_size"],
        moe_layers=tuple(encoder["moe"]["layers"]),
        num_experts=encoder["moe"]["num_experts"],
    )


def test_weights_are_distributed_as_the_original_s(model):
    own = dict(model.named_parameters())
    for path, want in STATS["split_rngs_false"].items():
        if path in ("head/bias",):
            # The original's constant is an argument of its configuration.
            continue
        # The converter says which of our parameters this is, and where a fused one holds it.
        name, index = _find(path, own)
        got = own[name][index].detach().double()
        assert got.numel() == torch.Size(want["shape"]).numel(), path
        count = got[0].numel() if "Moe/Mlp" in path else got.numel()
        margin = 6 * max(want["std"], 1e-12) / count**0.5
        assert abs(got.mean().item() - want["mean"]) <= 2 * margin, path
        assert abs(got.std(correction=0).item() - want["std"]) <= margin, path
        bound = max(abs(want["min"]), abs(want["max"]))
        uniform = want["std"] > 0 and bound / want["std"] < 1.8
        if uniform:
            assert got.abs().max().item() <= bound * 1.01, path
        if "Moe/Mlp" in path:
            assert torch.equal(got[0], got[-1]), "experts start alike"


def _find(path, own):
    for part, letter in enumerate(("query", "key", "value")):
        if f"SelfAttention/{letter}" in path:
            block = path.split("encoderblock_")[1].split("/")[0]
            leaf = "weight" if path.endswith("kernel") else "bias"
            width = own["blocks.0.attn.proj.weight"].shape[0]
            return f"blocks.{block}.attn.qkv.{leaf}", slice(part * width, (part + 1) * width)
    shape = STATS["split_rngs_false"][path]["shape"]
    (name,) = from_original({path: torch.zeros(shape).numpy()})
    return name, slice(None)


def test_tensors_on_meta_become_a_sound_model():
    model = vmoe_torch.VMoE(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_experts=4, device="meta")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.blocks[1].mlp.fc1.weight.std() > 0.05


@pytest.mark.parametrize("mode", ["jax", "jax_nlhb", "moco", "reset", "skip"])
def test_timm_modes_leave_sound_experts(mode):
    model = vmoe_torch.VMoE(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_experts=4, num_classes=7, weight_init=mode
    )
    mlp = model.blocks[1].mlp
    bound = (6 / (32 + 128)) ** 0.5
    assert mlp.fc1.weight.abs().max() <= bound
    assert mlp.fc1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert mlp.fc1.bias.abs().max() < 1e-5
    if mode == "moco":
        assert torch.equal(mlp.fc1.bias, torch.zeros_like(mlp.fc1.bias))
    if mode == "jax_nlhb":
        assert model.head.bias[0].item() == pytest.approx(-(torch.tensor(7.0).log().item()))


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"weight_init must be .*, got 'xavier'"):
        vmoe_torch.VMoE(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, weight_init="xavier")


def test_fix_init_scales_experts_by_depth():
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_experts": 4}
    model = vmoe_torch.VMoE(**kwargs, fix_init=True)
    ratio = model.blocks[1].mlp.fc2.weight.std() / model.blocks[3].mlp.fc2.weight.std()
    assert ratio.item() == pytest.approx(2**0.5, rel=0.05)
