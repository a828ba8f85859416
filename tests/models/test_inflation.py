"""Image models turned to video: a clip of one repeated frame has the image's patch tokens."""

import pytest
import timm
import torch
from torch import Tensor, nn

import vmoe_torch
from tests.conftest import GOLDEN
from vmoe_torch.checkpoints import inflate, read_weights
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.train import build_model
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.train.start import load_start

CHECKPOINT = GOLDEN / "checkpoints" / "params_1shard" / "ckpt"
TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5}
# A name, its arguments, and whether a VideoVMoE can be made so by arguments.
IMAGES = {
    "vmoe": ("test_vmoe", {**TINY, "depth": 2}, True),
    "vmoe, registers, tanh": ("test_vmoe2", {**TINY, "depth": 2}, True),
    "vmoe, map": ("test_vmoe", {**TINY, "depth": 2, "global_pool": "map"}, True),
    "vmoe, fixed positions": ("test_vmoe", {**TINY, "depth": 2, "pos_embed": "sincos2d"}, True),
    "vmoe, no positions": ("test_vmoe", {**TINY, "depth": 2, "pos_embed": "none"}, True),
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "num_classes": 5}, True),
    "dynamic vit": ("test_vit", {"num_classes": 5}, True),
    "gap": ("vit_medium_patch16_gap_256", {"img_size": 64, "depth": 2, "num_classes": 5}, True),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "num_classes": 5}, True),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 1, "embed_dim": 96, "num_heads": 3}, True),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 64, "depth": 1, "embed_dim": 96, "num_heads": 3}, False),
}


@torch.no_grad()
def image_model(case: str) -> nn.Module:
    """With random weights that all matter."""
    name, kwargs, _ = IMAGES[case]
    model = timm.create_model(name, **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def images_of(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def tokens_of(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix tokens and patches with their positions, before the blocks."""
    tokens = model._pos_embed(model.patch_embed(x))
    return tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("positions", ["repeated", "factorised"])
@pytest.mark.parametrize("case", IMAGES)
def test_a_repeated_frame_gives_the_images_tokens(case, positions):
    image = image_model(case)
    x = images_of(image)
    clip = x.unsqueeze(2).repeat(1, 1, 6, 1, 1)
    want_prefix, want = tokens_of(image, x)
    for tubelet_size in (1, 2, 3):
        for mode in ("central", "average"):
            video = inflate(image, 6, mode, tubelet_size=tubelet_size, positions=positions)
            assert not any(tensor.is_meta for tensor in [*video.parameters(), *video.buffers()])
            assert video.training == image.training
            steps = 6 // tubelet_size
            prefix, patches = tokens_of(video, clip)
            times = patches.unflatten(1, (steps, -1)).unbind(1)
            assert torch.equal(prefix, want_prefix)
            for time in times:
                if mode == "central":
                    assert torch.equal(time, want)
                else:
                    assert (time - want).abs().max() <= 1e-5 * want.abs().max()
                    assert tubelet_size > 1 or torch.equal(time, want)


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_gets_the_image_models_logits(case):
    image = image_model(case)
    x = images_of(image)
    video = inflate(image, 4)
    if isinstance(image, vmoe_torch.VMoE):
        vmoe_torch.set_routing(image, group_size="image")
    assert torch.equal(video(x), image(x))
    assert video.pretrained_cfg["mean"] == image.pretrained_cfg["mean"]


@pytest.mark.parametrize("case", IMAGES)
def test_an_inflated_model_can_be_made_again(case, tmp_path):
    image, remade = image_model(case), IMAGES[case][2]
    for positions in ("repeated", "factorised"):
        video = inflate(image, 4, positions=positions)
        assert (video.made_with is not None) == remade
        if remade:
            torch.save(video.state_dict(), tmp_path / "model.pt")
            clip = images_of(image).unsqueeze(2).repeat(1, 1, 4, 1, 1)
            again, _ = open_weights(read_weights(tmp_path / "model.pt"))
            assert torch.equal(again.eval()(clip), video(clip))


def test_the_image_model_is_left_alone_and_its_routing_goes_along():
    image = image_model("vmoe").train()
    vmoe_torch.set_routing(image, capacity_factor=0.5, num_selected_experts=1)
    before = {name: value.clone() for name, value in image.state_dict().items()}
    video = inflate(image, 4)
    assert video.training
    routing, own = video.blocks[1].mlp.routing(), image.blocks[1].mlp.routing()
    assert (own["group_size"], routing["group_size"]) == (8, 1)
    assert {**routing, "group_size": 8} == own
    with torch.no_grad():
        for parameter in video.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in image.state_dict().items())


def test_frames_differ_in_the_central_kernel():
    """Only the central frame of a tubelet counts at first, and the others learn."""
    video = inflate(image_model("vmoe"), 4)
    clip = torch.randn(1, 3, 4, 32, 32)
    want = video.patch_embed(clip)
    clip[:, :, ::2] = torch.randn(1, 3, 2, 32, 32)
    got = video.patch_embed(clip)
    assert torch.equal(got, want)
    got.sum().backward()
    assert video.patch_embed.proj.weight.grad[:, :, 0].abs().sum() > 0


def test_upcycled_models_and_other_dtypes():
    dense = image_model("vit")
    sparse = vmoe_torch.upcycle(dense, (1,), 4, num_selected_experts=1).to(torch.bfloat16)
    video = inflate(sparse, 4, "average")
    assert list(vmoe_torch.moe_layers(video)) == ["blocks.1.mlp"]
    assert {parameter.dtype for parameter in video.parameters()} == {torch.bfloat16}
    assert video(torch.randn(1, 3, 4, 64, 64, dtype=torch.bfloat16)).shape == (1, 5)
    assert video.made_with is None
    again = vmoe_torch.upcycle(inflate(dense, 4), (1,), 4)
    assert again(torch.randn(1, 3, 4, 64, 64)).shape == (1, 5)


def test_weights_by_name_through_the_one_resolver(tmp_path):
    image, _ = open_weights(read_weights(CHECKPOINT))
    torch.save(image.state_dict(), tmp_path / "image.pt")
    x = torch.randn(2, 3, *image.patch_embed.img_size)
    want = inflate(image.eval(), 4)(x)
    for source in (CHECKPOINT, str(CHECKPOINT)):
        assert torch.equal(inflate(source, 4).eval()(x), want)
    named = inflate("test_vmoe", 4, model_args={**TINY, "depth": 2})
    assert (named.num_frames, len(named.blocks)) == (4, 2)


@pytest.mark.parametrize("pos_embed", ["learn", "factorised"])
def test_a_run_may_begin_with_an_image_models_weights(pos_embed, tmp_path):
    """model.checkpoint of an image model: inflated, at another resolution, with a head of its own."""
    image = image_model("vmoe")
    torch.save(image.state_dict(), tmp_path / "image.pt")
    kwargs = {**TINY, "depth": 2, "num_frames": 4, "pos_embed": pos_embed}
    del kwargs["num_classes"]
    video = build_model(ModelConfig("test_vmoe_video", kwargs=kwargs), 5)
    load_start(video, str(tmp_path / "image.pt"))
    x = images_of(image)
    positions = "repeated" if pos_embed == "learn" else pos_embed
    inflated = inflate(image, 4, positions=positions)
    clip = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(video.eval()(clip), inflated(clip))
    larger = build_model(ModelConfig("test_vmoe_video", kwargs={**kwargs, "img_size": 48}), 7)
    load_start(larger, str(tmp_path / "image.pt"))
    assert larger(torch.randn(1, 3, 4, 48, 48)).shape == (1, 7)
    assert torch.equal(larger.blocks[0].attn.qkv.weight, image.blocks[0].attn.qkv.weight)
    grey = timm.create_model("test_vmoe_video", **{**kwargs, "num_classes": 5, "in_chans": 1})
    grey.load_pretrained(str(tmp_path / "image.pt"))
    want = image.patch_embed.proj.weight.sum(1, keepdim=True)
    assert torch.equal(grey.patch_embed.proj.weight[:, :, 1], want)
    assert not grey.patch_embed.proj.weight[:, :, 0].any()
    assert x.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("test_vmoe", {"frames": 5}, "frames must be a positive multiple of tubelet_size=2, got 5"),
        ("test_vmoe", {"frames": 0}, "frames must be a positive multiple of tubelet_size=2, got 0"),
        ("test_vmoe", {"mode": "centre"}, r"mode must be one of \('central', 'average'\), got 'centre'"),
        ("test_vmoe", {"positions": "learn"}, r"positions must be one of \('repeated', 'factorised'\), got 'learn'"),
        ("test_vmoe", {"tubelet_size": 0}, "tubelet_size must be .*, got 0"),
        ("resnet18", {}, "model must be a V-MoE of images or timm's VisionTransformer to be inflated, got ResNet"),
        ("test_vmoe_video", {}, "got VideoVMoE"),
        ("eee_s32_last2_e8", {}, "got VMoEEnsemble"),
        ("deit_tiny_distilled_patch16_224", {}, "got VisionTransformerDistilled"),
        ("no_such_model", {}, "no_such_model"),
    ],
)
def test_what_cannot_be_inflated(model, kwargs, message):
    if timm.is_model(model):
        kwargs = {**kwargs, "model_args": {"device": "meta"}}
    with pytest.raises(ValueError, match=message):
        inflate(model, **kwargs)


def test_arguments_of_a_model_go_with_a_name():
    with pytest.raises(ValueError, match="pretrained and model_args must go with a model's name, got a VMoE"):
        inflate(image_model("vmoe"), pretrained=True)
