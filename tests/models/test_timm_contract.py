"""What timm and its users expect of a model, on tiny V-MoEs.

Over 400 lines: a test for each of timm's promises, all on the same few models.
"""

import copy
import functools
import math

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn, use_fused_attn
from timm.models import _hub, save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vmoe_torch
from tests.tiny import tiny_model

writes_arguments = pytest.mark.skipif(
    tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 31),
    reason="timm before 1.0.31 saves no model arguments",
)

tiny = functools.partial(tiny_model, group_size=2)


def images(count: int = 2, size: int = 32, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(4)).to(dtype)


@torch.no_grad()
def scramble(model: nn.Module) -> nn.Module:
    """The head and the tokens begin at 0, which would hide faults."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


# Creating


def test_registry_lists_models_and_tags():
    names = timm.list_models("vmoe_*", exclude_filters="vmoe_video_*")
    assert len(names) == 15
    released = timm.list_pretrained("vmoe_*")
    trained = {name.partition(".")[0] for name in released}
    assert len(released) == 5
    tags = [f"{name}.untrained" for name in names if name not in trained]
    with_tags = timm.list_models("vmoe_*", exclude_filters="vmoe_video_*", include_tags=True)
    assert sorted(with_tags) == sorted(tags + released)
    assert set(timm.list_models(module="vmoe")) == {*names, "test_vmoe", "test_vmoe2"}
    assert all(timm.get_pretrained_cfg(name).first_conv == "patch_embed.proj" for name in names)


def test_create_by_tag_equals_by_name():
    torch.manual_seed(0)
    by_tag = tiny("test_vmoe.untrained")
    torch.manual_seed(0)
    by_name = tiny()
    assert by_tag.pretrained_cfg["tag"] == "untrained"
    assert all(torch.equal(a, b) for a, b in zip(by_tag.parameters(), by_name.parameters(), strict=True))


def test_create_pretrained_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("test_vmoe.untrained", pretrained=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_factory_device_and_dtype(device, dtype):
    for model in (tiny(device=device, dtype=dtype), tiny("test_vmoe2", device=device, dtype=dtype)):
        assert {(p.device.type, p.dtype) for p in [*model.parameters(), *model.buffers()]} == {(device, dtype)}
        assert model(images().to(device, dtype)).dtype == dtype


def test_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="num_expert_typo"):
        tiny(num_expert_typo=3)


def test_scale_mlp_norm_is_refused():
    with pytest.raises(ValueError, match="scale_mlp_norm is not supported"):
        tiny(scale_mlp_norm=True)


# Initialising


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"name": "test_vmoe2"},
        {"global_pool": "map"},
        {"pos_embed": "sincos2d"},
        {"representation_size": 24, "reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
        *({"weight_init": mode} for mode in ("jax", "jax_nlhb", "moco", "reset", "skip")),
    ],
    ids=str,
)
def test_init_weights_after_to_empty(kwargs):
    """Every parameter has the statistics that a model made on the device has."""
    model = tiny(**kwargs, embed_dim=64, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan)
    model.init_weights()
    made = tiny(**kwargs, embed_dim=64)
    if kwargs.get("weight_init") == "skip":
        made.init_weights()
    fresh = dict(made.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        want = fresh[name]
        if want.unique().numel() == 1:
            assert torch.equal(parameter, want), name
        else:
            # Six standard errors of a standard deviation; experts are copies of one.
            expert = any(f"{layer}.fc" in name for layer in vmoe_torch.moe_layers(model))
            numbers = parameter[0].numel() if expert else parameter.numel()
            assert parameter.std().item() == pytest.approx(want.std().item(), rel=6 / math.sqrt(numbers)), name
    assert torch.isfinite(model(images())).all()


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "reset", "skip"])
def test_weight_init_modes(mode):
    model = tiny(weight_init=mode)
    for layer in vmoe_torch.moe_layers(model).values():
        bound = math.sqrt(6 / (16 + 32))
        assert 0.8 * bound < layer.fc1.weight.abs().max() <= bound
        assert torch.equal(layer.fc1.weight[0], layer.fc1.weight[1])
        assert layer.fc1.bias.abs().max() < 1e-5
        assert layer.router.weight.std().item() == pytest.approx(0.25, rel=0.3)
    if mode in ("", "jax", "jax_nlhb"):
        assert model.head.weight.abs().max() == 0
        assert model.head.bias[0].item() == pytest.approx(-math.log(5) if mode == "jax_nlhb" else 0.0)


def test_weight_init_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=r"weight_init must be .*, got 'jaxx'"):
        tiny(weight_init="jaxx")


def test_init_values():
    assert all((block.ls2.gamma == 0.125).all() for block in tiny(init_values=0.125).blocks)


# Features


def test_features_only():
    model = tiny(features_only=True, out_indices=(1, 3))
    features = model(images())
    assert [tuple(f.shape) for f in features] == [(2, 16, 4, 4)] * 2
    assert model.feature_info.channels() == [16, 16]
    assert model.feature_info.reduction() == [8, 8]


def test_forward_intermediates():
    model = scramble(tiny(reg_tokens=1)).eval()
    x = images()
    final, features = model.forward_intermediates(x, indices=[1, 3], norm=True, return_prefix_tokens=True)
    assert torch.equal(final, model.forward_features(x))
    (_, _), (patches, prefix) = features
    assert torch.equal(torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1), final)
    only = model.forward_intermediates(x, indices=1, output_fmt="NLC", intermediates_only=True)
    assert only[0].shape == (2, 16, 16)


def test_get_intermediate_layers():
    model = scramble(tiny()).eval()
    (last,) = model.get_intermediate_layers(images(), n=1, norm=True)
    assert torch.equal(last, model.forward_features(images())[:, 1:])


def test_prune_intermediate_layers():
    model = scramble(tiny(representation_size=24)).eval()
    want = model.forward_intermediates(images(), indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert list(vmoe_torch.moe_layers(model)) == ["blocks.1.mlp"]
    assert torch.equal(model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0], want[0])
    model.train()
    model.forward_features(images()).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.reset_classifier(7, "token")
    assert model(images()).shape == (2, 7)


# Heads and tokens


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map"])
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False}, {"reg_tokens": 2}], ids=str)
def test_pools(pool, kwargs):
    if pool == "token" and kwargs.get("class_token") is False:
        with pytest.raises(AssertionError):
            tiny(global_pool=pool, **kwargs)
        return
    model = tiny(global_pool=pool, **kwargs)
    assert model(images()).shape == (2, 5)
    assert model.forward_features(images()).shape == (2, 16 + model.num_prefix_tokens, 16)


def test_no_pool_and_no_head():
    assert tiny(global_pool="", num_classes=0)(images()).shape == (2, 17, 16)


def test_reset_classifier():
    model = scramble(tiny(representation_size=24, dtype=torch.float64)).eval()
    x = images(dtype=torch.float64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, 24) == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    model.reset_classifier(9, "avg")
    assert model(x).shape == (2, 9)
    assert model.get_classifier().weight.dtype == torch.float64
    assert [name for name, _ in model.named_parameters()][-2:] == ["head.weight", "head.bias"]


# Sizes and loading


def test_set_input_size():
    for kwargs in ({}, {"pos_embed": "sincos2d"}):
        model = tiny(**kwargs)
        model.set_input_size(img_size=(48, 64))
        assert model(torch.randn(1, 3, 48, 64)).shape == (1, 5)
        model.set_input_size(patch_size=(16, 16))
        assert model(torch.randn(1, 3, 48, 64)).shape == (1, 5)


def test_dynamic_img_size():
    model = scramble(tiny(dynamic_img_size=True)).eval()
    assert model(images(size=48)).shape == (2, 5)
    assert torch.equal(model(images()), scramble_like(model, tiny())(images()))


def scramble_like(source: nn.Module, target: nn.Module) -> nn.Module:
    target.load_state_dict(source.state_dict())
    return target.eval()


@pytest.mark.parametrize(
    ("kwargs", "same"),
    [
        ({}, True),
        ({"img_size": 64}, False),
        ({"patch_size": 4}, False),
        ({"in_chans": 1}, False),
        ({"num_classes": 3}, False),
        ({"num_classes": 0}, False),
    ],
    ids=str,
)
def test_pretrained_file_adapts_to_the_model(tmp_path, kwargs, same):
    source = scramble(tiny(representation_size=24)).eval()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5, "input_size": (3, 32, 32)}
    model = tiny(pretrained=True, pretrained_cfg_overlay=overlay, representation_size=24, **kwargs).eval()
    for name in ("blocks.1.mlp.router.weight", "blocks.3.mlp.fc2.bias", "pre_logits.0.weight"):
        assert torch.equal(model.get_parameter(name), source.get_parameter(name)), name
    output = model(images(size=kwargs.get("img_size", 32), channels=kwargs.get("in_chans", 3)))
    assert output.shape == (2, kwargs.get("num_classes", 5) or 24)
    assert torch.equal(output, source(images())) if same else torch.isfinite(output).all()


def test_headless_state_dict_reloads():
    model = scramble(tiny(num_classes=0, representation_size=24)).eval()
    other = tiny(num_classes=0, representation_size=24).eval()
    other.load_state_dict(vmoe_torch.models.vmoe.checkpoint_filter_fn(dict(sorted(model.state_dict().items())), other))
    assert torch.equal(other(images()), model(images()))


@writes_arguments
def test_save_for_hf_and_local_dir(tmp_path):
    """timm writes down what the model was made with and what has changed since."""
    model = tiny(num_experts=3, moe_layers=[0, 3], representation_size=24, pos_embed="sincos2d")
    model.set_input_size(img_size=(48, 48))
    model.reset_classifier(7)
    scramble(model).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert list(vmoe_torch.moe_layers(loaded)) == ["blocks.0.mlp", "blocks.3.mlp"]
    assert torch.equal(loaded(images(size=48)), model(images(size=48)))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@writes_arguments
def test_push_to_hf_hub_uploads_what_loads(monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **kwargs):
            self.repo_id = None

        def create_repo(self, repo_id, **kwargs):
            self.repo_id = repo_id
            return self

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, repo_id, folder_path, **kwargs):
            uploaded[repo_id] = timm.create_model(f"local-dir:{folder_path}", pretrained=True).eval()

    monkeypatch.setattr(_hub, "HfApi", Api)
    model = scramble(tiny()).eval()
    timm.models.push_to_hf_hub(model, "someone/vmoe")
    assert torch.equal(uploaded["someone/vmoe"](images()), model(images()))


# Optimisers


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_weight_decay_and_layer_decay(layer_decay):
    model = tiny()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=layer_decay)
    groups = groups_of(model, optimizer)
    for name in ("fc1", "fc2"):
        assert groups[f"blocks.1.mlp.{name}.bias"]["weight_decay"] == 0.0
        assert groups[f"blocks.1.mlp.{name}.weight"]["weight_decay"] == 0.1
    assert groups["blocks.1.mlp.router.weight"]["weight_decay"] == 0.1
    assert groups["pos_embed"]["weight_decay"] == 0.0
    if layer_decay:
        scales = [groups[f"blocks.{i}.mlp.fc1.weight"]["lr_scale"] for i in range(4)]
        assert scales == [0.5**i for i in (4, 3, 2, 1)]
        assert groups["blocks.1.mlp.router.weight"]["lr_scale"] == scales[1]
        assert groups["head.weight"]["lr_scale"] == 1.0


def test_muon_leaves_experts_and_router_to_its_fallback():
    """Muon orthogonalises matrices; a user keeps it off the MoE layers with timm's fallback_list."""
    model = tiny()
    fallback = [f"{name}.*" for name in vmoe_torch.moe_layers(model)]
    optimizer = create_optimizer_v2(model, opt="muon", lr=0.01, weight_decay=0.1, fallback_list=fallback)
    for name, group in groups_of(model, optimizer).items():
        assert group.get("use_fallback", False) == name.startswith(("blocks.1.mlp.", "blocks.3.mlp.")), name
    model(images()).sum().backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# Training and running


def test_grad_checkpointing_changes_nothing():
    x = images()
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = scramble(tiny(noise_std=1.0, proj_drop_rate=0.1))
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate"])
def test_drop_rates(rate):
    """A rate changes training, not evaluation."""
    plain = scramble(tiny(noise_std=0.0))
    model = tiny(noise_std=0.0, **{rate: 0.5})
    model.load_state_dict(plain.state_dict())
    x = images()
    torch.manual_seed(0)
    assert not torch.equal(model(x), plain(x))
    model(x).sum().backward()
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_expert_drop_follows_proj_drop_unless_given():
    layers = vmoe_torch.moe_layers
    assert {layer.expert_drop for layer in layers(tiny(proj_drop_rate=0.25)).values()} == {0.25}
    model = tiny(proj_drop_rate=0.25, expert_drop=0.0)
    assert {(layer.expert_drop, layer.drop.p) for layer in layers(model).values()} == {(0.0, 0.25)}


def test_fused_attn_on_and_off():
    before = use_fused_attn()
    outputs = []
    try:
        for enable in (True, False):
            set_fused_attn(enable)
            torch.manual_seed(0)
            model = scramble(tiny()).eval()
            assert model.blocks[1].attn.fused_attn == enable
            outputs.append(model(images()))
    finally:
        set_fused_attn(bool(before))
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("name", ["test_vmoe", "test_vmoe2"])
def test_export(name):
    model = scramble(tiny(name)).eval()
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))


def test_compile_fullgraph():
    model = scramble(tiny(noise_std=0.0, depth=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(compiled(images()), model(images()))


def test_amp_bfloat16():
    model = scramble(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_float64_agrees_with_float32():
    model = scramble(tiny()).eval()
    want = copy.deepcopy(model).double()(images(dtype=torch.float64))
    assert want.dtype == torch.float64
    torch.testing.assert_close(model(images()).double(), want, rtol=1e-4, atol=1e-5)
