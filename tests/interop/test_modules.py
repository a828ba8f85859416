"""Tools that act on a module when it is called see experts and routers, and act on what the layer reads."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import vmoe_torch
from tests.parallel.processes import run
from tests.tiny import dropping, grey_images

# Their own messages: old enums in torchao, and in the libraries that load it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
IMAGES = grey_images()
TARGETS = ["mlp.fc1.weight", "mlp.fc2.weight", "mlp.router.weight"]


def first(model):
    return model.blocks[0].mlp


@pytest.mark.parametrize("router", ["top_experts", "expert_choice"])
def test_peft_target_parameters_train_and_merge(router):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = dropping(router=router)
    want = model(IMAGES).detach()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS)
    adapted = peft.get_peft_model(model, config)
    adapted.train()(IMAGES).square().sum().backward()
    lora = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * 3 * 2
    assert all(parameter.grad is not None for parameter in lora.values())
    assert all(lora[name].grad.abs().sum() > 0 for name in lora if "lora_B" in name)
    with torch.no_grad():
        for parameter in lora.values():
            parameter.normal_(std=0.3)
    adapted.eval()
    got = adapted(IMAGES)
    assert (got - want).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(IMAGES), want)
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), got)
    torch.testing.assert_close(adapted.merge_and_unload()(IMAGES), got, rtol=1e-4, atol=1e-5)


def test_peft_target_modules_names_what_it_cannot_adapt():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(ValueError, match=r"Target module ExpertLinear.* is not supported"):
        peft.get_peft_model(dropping(), peft.LoraConfig(target_modules=["fc1"]))


def test_pruning_holds_through_training():
    """Masks apply in every step: a stale weight would not change, a freed graph would raise."""
    model = dropping().train()
    layer = first(model)
    prune.l1_unstructured(layer.fc1, "weight", 0.5)
    prune.l1_unstructured(layer.fc2, "bias", 0.5)
    prune.random_unstructured(layer.router, "weight", 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()
    assert (layer.fc1.weight_orig.grad[layer.fc1.weight_mask == 0] == 0).all()
    assert layer.fc1.weight_orig.grad.abs().sum() > 0
    got = model.eval()(IMAGES)
    for module, name in ((layer.fc1, "weight"), (layer.fc2, "bias"), (layer.router, "weight")):
        prune.remove(module, name)
    torch.testing.assert_close(model(IMAGES), got)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_train(wrap):
    model = dropping()
    want = model(IMAGES)
    for module in (first(model).router, first(model).fc1, first(model).fc2):
        wrap(module)
    if wrap is not parametrizations.spectral_norm:
        torch.testing.assert_close(model(IMAGES), want)
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in first(model).parameters())
    if wrap is not nn.utils.weight_norm:
        model.eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offload_gives_the_same_logits(tmp_path, where):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = dropping()
    with torch.no_grad():
        want = model(IMAGES)
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert first(model).fc1.weight.device.type == "meta"
        torch.testing.assert_close(model(IMAGES), want)


def test_forward_hooks_see_the_parts():
    model, seen = dropping(), {}
    for name, module in first(model).named_children():
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    model(IMAGES)
    tokens = seen["fc1"][0]
    assert tokens.shape == (5 * 17, 16)
    assert seen["fc1"][1].shape == seen["fc2"][1].shape == (5 * 17, 16)
    routing = seen["router"][1]
    torch.testing.assert_close(routing.logits, first(model).router(tokens))
    assert torch.equal(routing.slots, first(model).record.slots)


def test_a_hook_changes_what_the_layer_gives():
    model = dropping()
    want = model(IMAGES)
    with torch.no_grad():
        for name, change in (("fc1", lambda m, a, y: 2 * y), ("router", lambda m, a, r: r._replace(gates=2 * r.gates))):
            handle = getattr(first(model), name).register_forward_hook(change)
            assert (model(IMAGES) - want).abs().max() > 1e-3, name
            handle.remove()
    torch.testing.assert_close(model(IMAGES), want)


@pytest.mark.parametrize("part", ["fc1", "fc2", None])
def test_captum_layer_methods(part):
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    model = dropping()
    layer = first(model) if part is None else getattr(first(model), part)
    activation = attr.LayerActivation(model, layer).attribute(IMAGES)
    assert activation.numel() == 5 * 17 * 16
    gradients = attr.LayerIntegratedGradients(model, layer).attribute(IMAGES, target=1, n_steps=3)
    assert gradients.shape == activation.shape
    assert gradients.abs().sum() > 0


def test_captum_integrated_gradients():
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    model = dropping(group_size="image")
    assert attr.IntegratedGradients(model).attribute(IMAGES, target=1, n_steps=3).abs().sum() > 0


def test_parts_called_alone():
    """A linear layer per expert, and the router's logits."""
    layer = first(dropping())
    tokens, rows = torch.randn(7, 16), torch.randn(4, 3, 16)
    for expert in range(4):
        linear = partial(nn.functional.linear, weight=layer.fc1.weight[expert], bias=layer.fc1.bias[expert])
        torch.testing.assert_close(layer.fc1(tokens)[expert], linear(tokens))
        torch.testing.assert_close(layer.fc1(rows)[expert], linear(rows[expert]))
    torch.testing.assert_close(layer.router(tokens), tokens @ layer.router.weight.t())
    for x in (torch.randn(7, 15), torch.randn(3, 7, 16), torch.randn(16)):
        with pytest.raises(ValueError, match=r"x must be \(R, 16\) or \(4, R, 16\), got"):
            layer.fc1(x)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 16\), got \(7, 15\)"):
        layer.router(torch.randn(7, 15))


def test_adapted_block_recomputes():
    """Parametrised experts inside activation checkpointing."""
    gradients = []
    for recompute in (False, True):
        model = dropping().train()
        model.set_grad_checkpointing(recompute)
        parametrizations.weight_norm(first(model).fc1)
        torch.manual_seed(0)
        model(IMAGES).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def _shard_leaves():
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    # No noise, losses or shared groups: two processes route as one.
    same = {"group_size": "image", "noise_std": 0.0, "importance_loss_weight": 0.0}
    model, alone, batch = dropping(**same).train(), dropping(**same).train(), grey_images(4)
    units = [
        fully_shard(part, mesh=mesh)
        for layer in vmoe_torch.moe_layers(model).values()
        for part in (layer.router, layer.fc1, layer.fc2)
    ]
    for unit in (*units, fully_shard(model, mesh=mesh)):
        unit.set_force_sum_reduction_for_comms(True)
    want = alone(batch)
    got = model(batch.chunk(world)[rank])
    torch.testing.assert_close(got, want.chunk(world)[rank])
    got.square().sum().backward()
    (want.square().sum() / world).backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_fully_shard_on_leaves(world, tmp_path):
    run(world, tmp_path, _shard_leaves)
