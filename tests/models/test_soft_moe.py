"""The models of Soft MoE and of expert choice: what they are made of, and that timm and our tools take them."""

import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_graph_node_names

import vmoe_torch
from tests.tiny import randomized
from vmoe_torch.evaluate import count_flops
from vmoe_torch.models.architecture import identified, shape_arguments
from vmoe_torch.parallel import PlannedRun, plan
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import build_model
from vmoe_torch.train.optimizer import build_optimizer

# Width, blocks, heads, patch, experts.
SIZES = {
    "s16": (384, 12, 6, 16, 128),
    "s14": (384, 12, 6, 14, 256),
    "b16": (768, 12, 12, 16, 128),
    "l16": (1024, 24, 16, 16, 128),
    "h14": (1280, 32, 16, 14, 256),
}
KINDS = ("soft_moe", "expert_choice")
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5}


def _tiny(kind: str = "soft_moe", **changes) -> torch.nn.Module:
    return randomized(timm.create_model(f"test_{kind}", **{**SMALL, **changes}))


def _images(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def test_they_are_registered():
    names = {f"{kind}_{size}" for kind in KINDS for size in SIZES} | {"test_soft_moe", "test_expert_choice"}
    assert set(timm.list_models(module="soft_moe")) == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_models_are_those_of_the_paper(kind, size):
    width, depth, heads, patch, experts = SIZES[size]
    model = timm.create_model(f"{kind}_{size}", device="meta")
    tokens = (224 // patch) ** 2
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
    assert model.patch_embed.patch_size == (patch, patch)
    assert (model.cls_token, model.global_pool, model.pos_embed.shape[1]) == (None, "avg", tokens)
    assert isinstance(model.norm, torch.nn.LayerNorm)
    assert isinstance(model.fc_norm, torch.nn.Identity)
    layers = vmoe_torch.moe_layers(model)
    assert tuple(layers) == tuple(f"blocks.{block}.mlp" for block in range(depth // 2, depth))
    for block in model.blocks:
        assert isinstance(block.attn.q_norm, torch.nn.LayerNorm)
        assert isinstance(block.attn.k_norm, torch.nn.LayerNorm)
    for layer in layers.values():
        assert (layer.num_experts, layer.fc1.weight.shape) == (experts, (experts, 4 * width, width))
        assert layer.group_size == 1
        if kind == "soft_moe":
            assert layer.router.mu.shape == (width, experts, 1)
            assert layer.noise_std == 0
        else:
            # 196 / 128 rounds to 2.
            assert layer.capacity(tokens) == {196: 2, 256: 1}[tokens]
            assert layer.noise_std == 1


@pytest.mark.parametrize("kind", KINDS)
def test_head_begins_at_zero(kind):
    model = timm.create_model(f"test_{kind}", **SMALL)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    # Other depths keep the second half.
    assert list(vmoe_torch.moe_layers(timm.create_model(f"test_{kind}", depth=6, **SMALL))) == [
        f"blocks.{block}.mlp" for block in (3, 4, 5)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_an_image_are_its_own(kind):
    model, images = _tiny(kind).double(), _images().double()
    want = model(images)
    assert want.std() > 0.1
    for number in range(len(images)):
        alone = model(images[number : number + 1])
        torch.testing.assert_close(alone, want[number : number + 1], rtol=0, atol=1e-12)
        others = torch.cat([images[number : number + 1], 10 * _images(4).double()])
        torch.testing.assert_close(model(others)[:1], want[number : number + 1], rtol=0, atol=1e-12)


def test_resolution_may_change_at_fixed_slots():
    model = _tiny(slots_per_expert=3)
    state = {name: value for name, value in model.state_dict().items() if "router" in name}
    larger = timm.create_model("test_soft_moe", **{**SMALL, "img_size": 48}, slots_per_expert=3)
    larger.load_state_dict({**larger.state_dict(), **state})
    assert larger.eval()(_images(side=48)).shape == (3, 5)
    model.set_input_size(img_size=48)
    assert model(_images(side=48)).shape == (3, 5)
    assert {layer.record.groups.rows for layer in vmoe_torch.moe_layers(model).values()} == {9}
    free = _tiny(dynamic_img_size=True)
    for side in (16, 40):
        assert free(_images(side=side)).isfinite().all()


def test_slots_of_a_capacity_factor_are_the_images():
    """A slot for every token at 16 patches and 4 experts; recorded, so that other images do not change it."""
    model = timm.create_model("test_soft_moe", **SMALL, slots_per_expert=0, capacity_factor=1.0)
    assert {layer.router.mu.shape for layer in vmoe_torch.moe_layers(model).values()} == {(64, 4, 4)}
    model.set_input_size(img_size=48)
    described = vmoe_torch.models.description.model_arguments(model)
    again = timm.create_model("test_soft_moe", **described)
    again.load_state_dict(model.state_dict())
    with_rest = timm.create_model("test_soft_moe", slots_per_expert=0, capacity_factor=1.0, class_token=True, **SMALL)
    assert {layer.router.mu.shape[2] for layer in vmoe_torch.moe_layers(with_rest).values()} == {round(17 / 4)}


@pytest.mark.parametrize("save", [vmoe_torch.save_for_hf, timm.models.save_for_hf])
def test_a_folder_keeps_the_slots_of_a_capacity_factor(save, tmp_path):
    model = _tiny(slots_per_expert=0, capacity_factor=2.0)
    save(model, tmp_path / "a")
    again = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    assert torch.equal(again(_images()), model(_images()))
    save(again, tmp_path / "b")
    larger = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True, img_size=48).eval()
    assert torch.equal(larger.blocks[2].mlp.router.mu, model.blocks[2].mlp.router.mu)
    assert larger(_images(side=48)).isfinite().all()
    # timm writes its record anew.
    model.set_input_size(img_size=48)
    save(model, tmp_path / "c")
    again = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    assert torch.equal(again(_images(side=48)), model(_images(side=48)))


@pytest.mark.parametrize(
    "changes",
    [{"num_selected_experts": 1}, {"capacity_factor": 0.5}, {"eval_capacity_factor": 2.0}, {"batch_priority": False}],
)
def test_what_does_not_apply_is_an_error(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"^{name} must be left out with router='soft'"):
        timm.create_model("test_soft_moe", **SMALL, **changes)


def test_a_budget_says_that_it_has_nothing_to_set():
    batches = [(_images(), torch.zeros(3, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"layers must route by top_experts or threshold, got soft in blocks\.2\.mlp"):
        vmoe_torch.set_budget(_tiny(), data=batches, flops=0.5)


def test_any_vmoe_may_have_soft_routers():
    model = timm.create_model("test_vmoe", **SMALL, router="soft", slots_per_expert=2)
    assert {layer.router.mu.shape for layer in vmoe_torch.moe_layers(model).values()} == {(64, 4, 2)}
    sparse = vmoe_torch.upcycle(
        "vit_tiny_patch16_224", [2, 3], 4, model_args={"depth": 4, "img_size": 48}, router="soft"
    )
    # Of 9 patches and a class token, whatever comes first.
    assert {layer.router.mu.shape for layer in vmoe_torch.moe_layers(sparse).values()} == {(192, 4, 3)}
    assert sparse(_images(0, side=48)).shape == (0, 1000)
    assert sparse(_images(side=48)).shape == (3, 1000)
    assert "blocks.2.mlp.router.mu" in sparse.no_weight_decay()


def test_an_upcycled_model_of_unknown_images_is_told_its_slots():
    dense = torch.nn.Module()
    dense.blocks = torch.nn.ModuleList([timm.create_model("vit_tiny_patch16_224", depth=1).blocks[0]])
    with pytest.raises(ValueError, match=r"^slots_per_expert must be at least 1 with router='soft' .*, got None for"):
        vmoe_torch.upcycle(dense, [0], 4, router="soft")
    sparse = vmoe_torch.upcycle(dense, [0], 4, router="soft", slots_per_expert=2)
    assert sparse.blocks[0].mlp.router.mu.shape == (192, 4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_tell_the_model(kind, tmp_path):
    model = _tiny(kind, img_size=64, patch_size=16)
    state = model.state_dict()
    assert identified(state, "x") == f"test_{kind}"
    found = shape_arguments(f"test_{kind}", state)
    assert (found["num_experts"], found["moe_layers"], found.get("slots_per_expert")) == (
        4,
        (2, 3),
        1 if kind == "soft_moe" else None,
    )
    vmoe_torch.save_for_hf(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert kind == "expert_choice" or "soft, 4 experts of 1 slots, every image on its own" in card
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = _images(side=64)
    assert torch.equal(again(images), model(images))


def test_gradients_reach_everything():
    model = _tiny().train()
    model(_images()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "attn.qkv" not in name)
    assert vmoe_torch.auxiliary_loss(model) == 0


def test_recomputed_blocks_give_the_same():
    gradients = []
    for recompute in (False, True):
        model = _tiny(noise_std=0.0).train()
        model.set_grad_checkpointing(recompute)
        model(_images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


def test_flops_and_plan():
    """2 D S (E P) for the logits and each mixture, beside E P rows through the experts."""
    model, images = _tiny(slots_per_expert=2), _images(4)
    flops = count_flops(model, images)
    assert len(flops.layers) == 2
    for counted in flops.layers.values():
        assert counted == 3 * 2 * 16 * 64 * 8 + 8 * 2 * 2 * 64 * 128
    planned = plan(model, PlannedRun(1, 1, 4))
    assert planned.flops_per_step == 3 * 4 * flops.total
    assert planned.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())
    # Each of the 2 ranks sends half of its 8 rows of 64 values per image, there and back.
    assert plan(model, PlannedRun(2, 2, 4)).exchange_per_layer == 2 * 2 * 8 * 64 * 2 // 2


@pytest.mark.parametrize("changes", [{"slots_per_expert": 2}, {"slots_per_expert": 8, "qk_norm": False}])
def test_plan_is_what_a_step_holds(changes):
    model = timm.create_model("test_soft_moe", img_size=32, patch_size=4, num_classes=10, **changes)
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(_images(8)).logsumexp(1).sum()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size = sum(nbytes for pointer, (nbytes, _) in held.items() if pointer not in parameters)
    planned = plan(model, PlannedRun(1, 1, 8, compute_bytes=4)).activations
    assert abs(size / planned - 1) <= 0.03
    assert loss.isfinite()


def test_recipe_decays_as_the_original():
    config = load_recipe("pretrain_soft_moe").override("data.root=somewhere")
    config.check()
    tiny = config.override("model.name=test_soft_moe", "model.kwargs.img_size=32", "model.kwargs.patch_size=8").model
    model = build_model(tiny, 5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    strengths = {}
    for group in build_optimizer(model, config.optim).param_groups:
        for parameter in group["params"]:
            strengths[names[id(parameter)]] = group["weight_decay"]
    assert strengths.keys() == dict(model.named_parameters()).keys()
    assert strengths["head.weight"] == 3.0
    for name, strength in strengths.items():
        if name.endswith(".router.mu") or name.endswith("bias") or "norm" in name or name == "pos_embed":
            assert strength == 0, name
        elif name != "head.weight":
            assert strength == 0.03, name
    assert strengths["blocks.2.mlp.router.scale"] == 0.03


def test_timms_own_decay_leaves_slots_alone():
    model = timm.create_model("test_soft_moe", **SMALL)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", weight_decay=0.1)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for layer in vmoe_torch.moe_layers(model).values():
        assert id(layer.router.mu) not in decaying
        assert id(layer.fc1.weight) in decaying


def test_timm_takes_them_apart():
    """FX, intermediate features, a new head, pruning: what timm does with any of its ViTs."""
    model, images = _tiny(), _images()
    assert "blocks.3.mlp" in get_graph_node_names(model)[1]
    extracted = create_feature_extractor(model, {"blocks.3.mlp": "y", "head": "logits"})(images)
    assert torch.equal(extracted["logits"], model(images))
    final, intermediates = model.forward_intermediates(images)
    assert (final.shape, len(intermediates)) == ((3, 16, 64), 4)
    features = timm.create_model("test_soft_moe", features_only=True, img_size=32, patch_size=8)
    assert features(images)[-1].shape == (3, 64, 4, 4)
    model.reset_classifier(7)
    assert not model.head.weight.any()
    model.prune_intermediate_layers([2])
    assert len(model.blocks) == 3
    moved = timm.create_model("test_soft_moe", device="meta", **SMALL).to_empty(device="cpu")
    moved.init_weights()
    assert moved(images).isfinite().all()
    assert all(layer.router.scale == 1 for layer in vmoe_torch.moe_layers(moved).values())
