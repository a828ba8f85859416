"""A dense model of the experts' averages: a plain Vision Transformer."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import Mlp

import vmoe_torch
from tests.tiny import dropping, grey_images, randomized, tiny_model
from vmoe_torch.checkpoints import read_weights
from vmoe_torch.evaluate import ExpertUsage, expert_usage
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.parallel import export_safetensors

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("experts", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_experts_give_the_dense_model_back(experts, dtype):
    dense = timm.create_model("test_vit", num_classes=4, proj_drop_rate=0.1).to(dtype).eval()
    again = vmoe_torch.to_dense(vmoe_torch.upcycle(dense, num_experts=experts))
    images = torch.randn(2, 3, 160, 160, dtype=dtype)
    assert {name: type(module) for name, module in again.named_modules()} == {
        name: type(module) for name, module in dense.named_modules()
    }
    assert all(torch.equal(value, dense.get_parameter(name)) for name, value in again.named_parameters())
    assert torch.equal(again(images), dense(images))
    assert again.blocks[1].mlp.drop1.p == again.blocks[1].mlp.drop2.p == 0.1


@pytest.mark.parametrize("router", ["top_experts", "expert_choice"])
@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "relu"])
def test_averages_are_the_formula(router, act_layer):
    model = dropping(num_experts=3, router=router, act_layer=act_layer, capacity_factor=1.0)
    images = grey_images()
    usage = expert_usage(model, [images])
    cases = ((None, False), (usage, False), (usage, True), ({name: [0, 5, 0] for name in usage}, False))
    for given, scaled in cases:
        dense = vmoe_torch.to_dense(model, usage=given, scale_gates=scaled)
        for name, layer in vmoe_torch.moe_layers(model).items():
            mlp, scale = dense.get_submodule(name), 1.0
            assert type(mlp) is Mlp
            weights = np.ones(3) if given is None else np.asarray(getattr(given[name], "choices", given[name]))
            if scaled:
                scale = usage[name].gates.numpy().sum() / usage[name].tokens
                assert 0.05 < scale < 2
            for key, value in mlp.named_parameters():
                experts = layer.get_parameter(key).detach().numpy().astype(np.float64)
                want = np.tensordot(weights / weights.sum(), experts, 1) * (scale if key.startswith("fc2") else 1)
                np.testing.assert_allclose(value.detach(), want, rtol=1e-6, atol=1e-9)
                if given == {name: [0, 5, 0] for name in usage}:
                    assert torch.equal(value, layer.get_parameter(key)[1])
        assert dense(images).shape == (5, 4)


def test_a_v_moe_becomes_one_without_experts(tmp_path):
    """With timm's names, and made again from what it says."""
    model = randomized(tiny_model(act_layer="gelu"))
    vmoe_torch.set_routing(model, layers=["blocks.1.mlp"], num_selected_experts=1)
    dense = vmoe_torch.to_dense(model)
    assert not vmoe_torch.moe_layers(dense)
    assert vmoe_torch.moe_layers(model)
    want = dense(IMAGES)
    export_safetensors(dense, tmp_path / "x.safetensors")
    vmoe_torch.save_for_hf(dense, tmp_path / "hub")
    opened = open_weights(read_weights(tmp_path / "x.safetensors"))[0]
    for other in (opened, timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)):
        assert torch.equal(other.eval()(IMAGES), want)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_classes": 5, "num_heads": 2}
    plain = timm.models.VisionTransformer(**size, mlp_ratio=2.0).eval()
    plain.load_state_dict(dense.state_dict())
    assert torch.equal(plain(IMAGES), want)


def test_the_model_stays_and_the_copy_shares_nothing():
    model = randomized(tiny_model()).train()
    model.get_parameter("blocks.3.mlp.fc1.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = vmoe_torch.to_dense(model)
    assert dense.training
    assert dense.blocks[1].mlp.training
    assert not dense.get_parameter("blocks.3.mlp.fc1.weight").requires_grad
    for parameter in dense.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_wrong_is_named():
    model = tiny_model()
    usage = {name: torch.ones(4) for name in vmoe_torch.moe_layers(model)}
    for text, given, options in (
        ("model must have at least one MoE layer", timm.create_model("test_vit"), {}),
        ("model must have its MoE layers inside", model.blocks[1].mlp, {}),
        ("model must not be an ensemble", timm.create_model("eee_s32_last2_e8", device="meta"), {}),
        ("usage must be of expert_usage to scale by gates, got NoneType", model, {"scale_gates": True}),
        ("usage must be of expert_usage to scale by gates, got Tensor", model, {"usage": usage, "scale_gates": True}),
        (
            "usage must be above 0 for at least one expert",
            model,
            {"usage": {name: 0 * value for name, value in usage.items()}},
        ),
        (
            r"usage must be 4 finite numbers of at least 0 for blocks\.1\.mlp",
            model,
            {"usage": {"blocks.1.mlp": ExpertUsage(torch.ones(3), torch.ones(3), 1)}},
        ),
    ):
        with pytest.raises(ValueError, match=text):
            vmoe_torch.to_dense(given, **options)
