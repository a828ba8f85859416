"""Forwards that share what no routing changes: the same bits, and less work."""

import pytest
import timm
import torch

import vmoe_torch
from vmoe_torch.evaluate.prefix import layer_forward, shared_forward
from vmoe_torch.evaluate.settings import setting_grid

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2}
MODELS = {
    "last": lambda: timm.create_model("test_vmoe", moe_layers="last1", weight_init="jax", **SIZE),
    "first": lambda: timm.create_model("test_vmoe2", moe_layers=[0, 3], weight_init="jax", **SIZE),
    "upcycled": lambda: vmoe_torch.upcycle("vit_tiny_patch16_224", [2], 4, model_args=SIZE),
    "ensemble": lambda: timm.create_model("eee_s32_last2_e8", **SIZE),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_whole_forwards(name):
    model = MODELS[name]().eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(8, 3, 32, 32)
    seen = set()
    with torch.no_grad():
        forward = shared_forward(model, images)
        for setting in setting_grid([1.05, 0.3], [1, 2]):
            with vmoe_torch.routing(model, **setting.changes()):
                logits = forward()
                assert torch.equal(logits, model(images))
            seen.add(logits.sum().item())
    assert len(seen) > 1


def test_blocks_before_the_first_experts_run_once():
    model = MODELS["last"]().eval()
    calls = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    forward = shared_forward(model, torch.randn(2, 3, 32, 32))
    for _ in range(3):
        forward()
    assert [calls.count(number) for number in range(5)] == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("name", MODELS)
def test_one_layer_changed_is_a_whole_forward(name):
    model = MODELS[name]().eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        logits, forward = layer_forward(model, images)
        assert torch.equal(logits, model(images))
        for layer_name, layer in vmoe_torch.moe_layers(model).items():
            with vmoe_torch.routing(model):
                vmoe_torch.set_routing(model, layers=[layer_name], num_selected_experts=1, capacity_factor=0.3)
                changed = forward(layer)
                assert torch.equal(changed, model(images))
            assert not torch.equal(changed, logits)


def test_blocks_before_the_changed_layer_do_not_run():
    model = MODELS["first"]().eval()
    calls = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    _, forward = layer_forward(model, torch.randn(2, 3, 32, 32))
    calls.clear()
    forward(model.blocks[3].mlp)
    assert calls == [3, 4]


def test_a_dense_model_runs_whole():
    model = timm.create_model("vit_tiny_patch16_224", **SIZE).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(shared_forward(model, images)(), model(images))
