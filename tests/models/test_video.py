"""Video V-MoEs: clips and images, what is refused, positions over time, routing by clip, and timm's promises."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vmoe_torch
from tests.tiny import randomized
from vmoe_torch.checkpoints import export_original, read_weights
from vmoe_torch.evaluate import count_flops
from vmoe_torch.export import export_program
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.parallel import PlannedRun, plan
from vmoe_torch.planning import forward_flops

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_classes": 5}


def tiny(**changes) -> vmoe_torch.models.VideoVMoE:
    """MoE layers in blocks 1 and 3 of 4; 2 times of 4 x 4 patches, and a class token."""
    return randomized(timm.create_model("test_vmoe_video", **{**SIZE, **changes}))


def clips(count: int = 2, frames: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 3, frames, size, size, generator=torch.Generator().manual_seed(4))


def test_models_and_what_timm_knows_of_them():
    names = ["vmoe_video_b16", "vmoe_video_l16", "vmoe_video_s16"]
    assert timm.list_models("vmoe_video_*") == names
    assert set(timm.list_models(module="video")) == {*names, "test_vmoe_video"}
    for name in names:
        model = timm.create_model(name, device="meta")
        cfg = model.pretrained_cfg
        assert (cfg["input_size"], cfg["num_frames"], cfg["frame_stride"]) == ((3, 224, 224), 16, 4)
        assert model.default_cfg is cfg
        assert (model.num_frames, model.tubelet_size) == (16, 2)
        assert model.patch_embed.proj.weight.shape == (model.embed_dim, 3, 2, 16, 16)
        assert {layer.group_size for layer in vmoe_torch.moe_layers(model).values()} == {1}
    overlay = {"num_frames": 8, "frame_stride": 3}
    model = tiny(pretrained_cfg_overlay=overlay)
    assert (model.num_frames, model.pretrained_cfg["frame_stride"]) == (8, 3)
    assert tiny(num_frames=6, tubelet_size=3).num_frames == 6


@pytest.mark.parametrize(
    ("name", "experts", "shape"),
    [
        ("vmoe_video_s16", 32, (8, 512, 2048)),
        ("vmoe_video_b16", 8, (12, 768, 3072)),
        ("vmoe_video_l16", 4, (24, 1024, 4096)),
        ("test_vmoe_video", 4, (4, 64, 128)),
    ],
)
def test_parameters_and_flops_are_the_formulas(name, experts, shape):
    (depth, width, hidden), classes = shape, 400
    model = timm.create_model(name, num_experts=experts, num_classes=classes, device="meta")
    side, steps, sparse = model.patch_embed.img_size[0] // 16, model.num_frames // 2, depth // 2
    patches, pixels = steps * side * side, 3 * 2 * 16 * 16
    length = patches + 1
    block = 4 * width + 4 * width * width + 4 * width
    mlp = 2 * width * hidden + hidden + width
    parameters = pixels * width + width + width + length * width + depth * block + 2 * width + classes * (width + 1)
    parameters += (depth - sparse) * mlp + sparse * (experts * mlp + width * experts)
    assert sum(p.numel() for p in model.parameters()) == parameters
    capacity = 4 * math.ceil(math.ceil(length * 2 * 1.05 / experts) / 4)
    attention = 8 * length * width * width + 4 * length * length * width
    flops = 2 * patches * pixels * width + depth * attention + 2 * width * classes
    flops += (depth - sparse) * 4 * length * width * hidden
    flops += sparse * (2 * length * width * experts + 4 * experts * capacity * width * hidden)
    size = model.patch_embed.img_size
    assert count_flops(model, torch.empty(1, 3, model.num_frames, *size, device="meta")).total == flops
    assert forward_flops(model, 1) == flops


def test_tokens_are_those_of_the_definition_one_time_after_another():
    model = tiny().double()
    x = clips(frames=4).double()
    proj = model.patch_embed.proj
    kernel, bias = proj.weight.detach().numpy(), proj.bias.detach().numpy()
    cut = x.numpy().reshape(2, 3, 2, 2, 4, 8, 4, 8)  # (B, C, N, t, rows, 8, columns, 8)
    want = np.einsum("bcntrhsw,dcthw->bnrsd", cut, kernel) + bias
    got = model.patch_embed(x).detach().numpy()
    np.testing.assert_allclose(got, want.reshape(2, 32, 16), rtol=1e-10, atol=1e-10)
    # And they are what nn.Conv3d gives.
    plain = nn.functional.conv3d(x, proj.weight, proj.bias, (2, 8, 8)).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patch_embed(x), plain, rtol=1e-10, atol=1e-10)
    x = torch.randn(1, 3, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = proj.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(proj, {"weight": weight}, (x,)), (x, weight), fast_mode=True
    )


@pytest.mark.parametrize("pos_embed", ["learn", "factorised", "none"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}], ids=str
)
def test_images_are_clips_of_one_tubelet(pos_embed, kwargs):
    model = tiny(pos_embed=pos_embed, **kwargs)
    images = clips()[:, :, 0]
    assert torch.equal(model(images), model(images.unsqueeze(2).expand(-1, -1, 2, -1, -1)))
    tokens = model._pos_embed(model.patch_embed(images))
    if pos_embed == "learn":
        # The position of an image is that of the first time.
        first = model.num_prefix_tokens
        position = model.pos_embed[:, model.position_prefix :][:, :16]
        assert torch.equal(tokens[:, first:], model.patch_embed(images) + position)
    # Of another length, the ends have the positions of the ends.
    longer = model._pos_embed(model.patch_embed(clips(frames=8)))
    assert longer.shape[1] == model.num_prefix_tokens + 4 * 16


def test_factorised_positions_are_sums():
    model = tiny(pos_embed="factorised")
    assert (model.pos_embed.shape, model.pos_embed_time.shape) == ((1, 17, 16), (1, 2, 16))
    x = clips()
    got = model._pos_embed(model.patch_embed(x)) - torch.cat(
        [model.cls_token.expand(2, -1, -1), model.patch_embed(x)], 1
    )
    sums = model.pos_embed[:, 1:].unsqueeze(1) + model.pos_embed_time.unsqueeze(2)
    want = torch.cat([model.pos_embed[:, :1], sums.flatten(1, 2)], 1)
    assert torch.allclose(got, want.expand(2, -1, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.transpose(1, 2), r"must be \(B, C, T, H, W\) with C=3, got .* look like \(B, T, C, H, W\)"),
        (lambda x: x.permute(0, 2, 3, 4, 1), r"C=3, got \(2, 4, 32, 32, 3\): they look like \(B, T, H, W, C\)"),
        (lambda x: x[:, :2], r"C=3, got \(2, 2, 4, 32, 32\)$"),
        (lambda x: x[:, :, :3], r"T of clips must be a positive multiple of tubelet_size=2, got 3 in"),
        (lambda x: x[:, :, :0], r"T of clips must be a positive multiple of tubelet_size=2, got 0 in"),
        (lambda x: x[0], r"it looks like one clip \(C, T, H, W\), which x.unsqueeze\(0\)"),
        (lambda x: x[:, :, 0].permute(0, 2, 3, 1), r"look like \(B, H, W, C\)"),
        (lambda x: x[0, 0], r"clips must be \(B, C, T, H, W\), or images \(B, C, H, W\), got \(4, 32, 32\)"),
        (lambda x: x[..., :16], r"H, W = 32, 32, got \(2, 3, 4, 32, 16\); set_input_size changes it"),
    ],
)
def test_what_is_no_clip_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny()(change(clips()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frames": 5}, "num_frames must be a positive multiple of tubelet_size=2, got 5"),
        ({"num_frames": 0}, "num_frames must be a positive multiple of tubelet_size=2, got 0"),
        ({"tubelet_size": 0}, "tubelet_size must be .*, got 0"),
        ({"pos_embed": "sincos2d"}, "pos_embed must be 'learn', 'factorised' or 'none' for a video model"),
        ({"dynamic_img_size": True}, "dynamic_img_size must be False for a video model"),
        ({"dynamic_img_pad": True}, "no dynamic_img_pad"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


@pytest.mark.parametrize("router", ["top_experts", "expert_choice"])
@pytest.mark.parametrize("batch_priority", [True, False])
def test_a_clip_does_not_depend_on_its_batch(router, batch_priority):
    model = tiny(router=router, capacity_factor=0.5, capacity_multiple_of=1, batch_priority=batch_priority)
    x = clips(3)
    together = model(x)
    slots = model.blocks[1].mlp.record.slots.clone().unflatten(0, (3, -1)) >= 0
    assert 0 < slots.float().mean() < 1
    for number, clip in enumerate(x):
        alone = model(clip[None])
        assert torch.allclose(alone[0], together[number], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.blocks[1].mlp.record.slots >= 0, slots[number])
    if router == "top_experts":
        vmoe_torch.set_routing(model, group_size="batch")
        assert not torch.allclose(model(x), together, rtol=1e-4, atol=1e-5)


def test_bpr_ranks_the_patches_of_all_frames_together():
    """What is dropped are the patches of the least gates of the clip, whatever their time."""
    model = tiny(class_token=False, global_pool="avg", num_experts=1, num_selected_experts=1, moe_layers=(0,))
    layer = model.blocks[0].mlp
    vmoe_torch.set_routing(model, capacity_factor=0.5, batch_priority=True)
    model(clips(1))
    # One expert: all gates are 1, ties go by order in time, so the first time survives whole.
    assert (layer.record.slots[:, 0] >= 0).tolist() == [True] * 16 + [False] * 16
    model = tiny(class_token=False, global_pool="avg", num_selected_experts=1, moe_layers=(0,), capacity_multiple_of=1)
    vmoe_torch.set_routing(model, capacity_factor=0.5)
    model(clips(1))
    record = model.blocks[0].mlp.record
    kept, gates, experts = record.slots[:, 0] >= 0, record.gates[:, 0], record.experts[:, 0]
    for expert in range(4):
        mine = experts == expert
        if (mine & ~kept).any():
            assert gates[mine & kept].min() >= gates[mine & ~kept].max()
    assert kept.unflatten(0, (2, 16)).any(1).all()


@pytest.mark.parametrize("pos_embed", ["learn", "factorised"])
def test_set_input_size(pos_embed):
    model = tiny(pos_embed=pos_embed)
    before = model.pos_embed.detach().clone()
    with pytest.raises(ValueError, match="num_frames must be"):
        model.set_input_size(num_frames=3)
    assert torch.equal(model.pos_embed, before)
    x = clips()
    logits = model(x)
    model.set_input_size(num_frames=8)
    assert model.num_frames == 8
    model.set_input_size(num_frames=4)
    # Ends stay on ends.
    assert torch.allclose(model(x), logits, rtol=1e-4, atol=1e-5)
    model.set_input_size(img_size=(48, 32), patch_size=16, num_frames=6)
    assert model.patch_embed.grid_size == (3, 2)
    assert model(torch.randn(1, 3, 6, 48, 32)).shape == (1, 5)
    assert model.pos_embed.shape == (1, 1 + 6 * (3 if pos_embed == "learn" else 1), 16)


def test_positions_resized_in_time_are_linear():
    model = tiny(num_frames=4)
    first, last = model.pos_embed.detach()[:, 1:].unflatten(1, (2, 16)).unbind(1)
    model.set_input_size(num_frames=6)
    times = model.pos_embed.detach()[:, 1:].unflatten(1, (3, 16))
    assert torch.allclose(times[:, 1], (first + last) / 2, atol=1e-6)
    assert torch.equal(times[:, 0], first)
    assert torch.equal(times[:, 2], last)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 1}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_features(kwargs):
    model = tiny(**kwargs)
    x, first = clips(), model.num_prefix_tokens
    final, features = model.forward_intermediates(x, indices=[1, 3], norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert [tuple(feature.shape) for feature in features] == [(2, 16, 2, 4, 4)] * 2
    assert torch.equal(features[1].flatten(2).transpose(1, 2), final[:, first:])
    assert torch.equal(model.forward_head(final), model(x))
    (last,) = model.get_intermediate_layers(x, n=1, norm=True)
    assert torch.equal(last, final[:, first:])
    found = model.forward_intermediates(x, indices=1, output_dict=True, return_prefix_tokens=True, output_fmt="NLC")
    assert found["image_intermediates"][0].shape == (2, 32, 16)
    assert ("image_intermediates_prefix" in found) == (first > 0)
    only = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
    assert len(only) == 1
    images = model.forward_intermediates(x[:, :, 0], indices=[0], intermediates_only=True)
    assert images[0].shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match="output_fmt must be"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_head_and_groups_of_parameters():
    model = tiny(pos_embed="factorised")
    model.reset_classifier(7)
    assert model(clips()).shape == (2, 7)
    assert [name for name, _ in model.named_parameters()][-2:] == ["head.weight", "head.bias"]
    assert "pos_embed_time" in model.no_weight_decay()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    time, patch = group[id(model.pos_embed_time)], group[id(model.patch_embed.proj.weight)]
    assert (time["lr_scale"], time["weight_decay"]) == (patch["lr_scale"], 0.0)
    assert group[id(model.head.weight)]["lr_scale"] == 1.0 > patch["lr_scale"]


@pytest.mark.parametrize("mode", ["", "jax", "moco", "reset", "skip"])
def test_weights_begin_soundly_after_to_empty(mode):
    model = timm.create_model("test_vmoe_video", pos_embed="factorised", weight_init=mode, device="meta", **SIZE)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    if mode in ("", "jax"):
        assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 2 * 8 * 8) ** -0.5, rel=0.1)
    assert model.pos_embed_time.std() > 0


@pytest.mark.parametrize("pos_embed", ["learn", "factorised", "none"])
def test_weights_travel(pos_embed, tmp_path):
    model = tiny(pos_embed=pos_embed)
    model.set_input_size(num_frames=6)
    vmoe_torch.set_routing(model, capacity_factor=0.5)
    x, buffer = clips(frames=6), io.BytesIO()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again, told = open_weights(read_weights(tmp_path / "model.pt"))
    assert "test_vmoe_video" in told
    assert torch.equal(again.eval()(x), model(x))
    vmoe_torch.save_for_hf(model, tmp_path / "hub")
    hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(hub(x), model(x))
    assert (hub.num_frames, hub.pretrained_cfg["frame_stride"]) == (6, 2)
    pickle.dump(model, buffer)
    assert torch.equal(pickle.loads(buffer.getvalue())(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    # Another length and size: loaded as set_input_size does it.
    larger = timm.create_model("test_vmoe_video", pos_embed=pos_embed, **{**SIZE, "img_size": 48, "num_frames": 4})
    larger.load_pretrained(str(tmp_path / "model.pt"))
    model.set_input_size(img_size=48, num_frames=4)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in larger.state_dict().items()} == shapes
    if pos_embed == "factorised":
        assert torch.equal(larger.pos_embed_time, model.pos_embed_time)


def test_weights_of_other_tubelets_and_the_originals_format_are_refused(tmp_path):
    torch.save(tiny(tubelet_size=4).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="tubelet_size must be 4 for these weights, got 2"):
        tiny().load_pretrained(str(tmp_path / "model.pt"))
    with pytest.raises(ValueError, match="as the original has no video models"):
        export_original(tiny(), tmp_path / "ckpt")


def test_plain_positions_of_another_size_need_their_grid(tmp_path):
    model, state = tiny(), dict(tiny(num_frames=8).state_dict())
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"pos_embed must be \(1, 33, 16\), or the weights tell its grid"):
        model.load_pretrained(str(tmp_path / "model.pt"))


def test_compiles_whole():
    model, x = tiny(depth=1, moe_layers=(0,), pos_embed="factorised"), clips()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("kwargs", [{}, {"pos_embed": "factorised"}], ids=str)
def test_scripted(kwargs):
    model, x = tiny(depth=2, **kwargs), clips()
    scripted = torch.jit.script(model)
    assert torch.allclose(scripted(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(scripted(x[:, :, 0]), model(x[:, :, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"pos_embed": "factorised"}], ids=str)
def test_traced_for_features(kwargs):
    model, x = tiny(depth=2, **kwargs), clips()
    traced = timm.models.create_feature_extractor(model, {"blocks.0": "first", "head": "logits"})
    found = traced(x)
    assert found["first"].shape == (2, 33, 16)
    assert torch.allclose(found["logits"], model(x), rtol=1e-4, atol=1e-5)


def test_export_takes_clips():
    model, x = tiny(depth=2), clips()
    program = export_program(model, x, dynamic_batch=True)
    assert torch.allclose(program.module()(clips(3)), model(clips(3)), rtol=1e-4, atol=1e-5)


def test_checkpointing_and_transforms_give_the_gradients():
    model, x = tiny(importance_loss_weight=0.0, load_loss_weight=0.0), clips()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.set_grad_checkpointing()
    for name, gradient in gradients().items():
        assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-4), name
    assert plain["pos_embed"].abs().sum() > 0
    model.set_grad_checkpointing(False)
    values = dict(model.named_parameters())
    grads = torch.func.grad(lambda values: torch.func.functional_call(model, values, (x,)).square().sum())(values)
    assert torch.allclose(grads["patch_embed.proj.weight"], plain["patch_embed.proj.weight"], rtol=1e-3, atol=1e-3)


def test_plan_counts_clips():
    model = timm.create_model("test_vmoe_video", device="meta")
    step = plan(model, PlannedRun(gpus=2, ep=2, batch=4, gpu="h200", autocast=True))
    assert step.flops_per_step == 3 * forward_flops(model, 2)
    assert (
        step.activations
        > plan(
            timm.create_model("test_vmoe_video", num_frames=2, device="meta"), PlannedRun(gpus=2, ep=2, batch=4)
        ).activations
    )


def test_timms_own_saving_keeps_frames_and_stride(tmp_path):
    model = tiny(num_frames=8)
    save_for_hf(model, tmp_path / "hub", model_args={**SIZE, "num_frames": 8})
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(again(clips(frames=8)), model(clips(frames=8)))
    assert (again.num_frames, again.pretrained_cfg["frame_stride"]) == (8, 2)
