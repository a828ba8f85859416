"""Experts with int8 weights: what they are to the bit, what still works with them, and what refuses them."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import vmoe_torch
from tests.tiny import dropping, grey_images, randomized, tiny_model
from vmoe_torch.evaluate import count_flops
from vmoe_torch.export import count_experts, export_program, save_onnx, save_pt2
from vmoe_torch.layers import ROUTERS, ExpertLinear, MoeMlp
from vmoe_torch.layers.int8_experts import int8_layers, weight_count
from vmoe_torch.parallel import materialize, parallelize

IMAGES = grey_images()
ROUTED = {
    "soft": {"router": "soft", "slots_per_expert": 2, "capacity_factor": 1.05},
    "threshold": {"router": "threshold", "mean_selected_experts": 1.5},
    "expert_choice": {"router": "expert_choice"},
    "top_experts": {},
    "dropless": {"capacity_factor": "dropless"},
    "sizes": {"expert_hidden": [16, 64, 0, 16]},
    "no biases": {"proj_bias": False},
    "shared": {"shared_expert_hidden": 8},
    "bfloat16 rows": {"dispatch_dtype": "bfloat16"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def filled(dtype, weight):
    """An `ExpertLinear` with this weight (E, out, in)."""
    layer = ExpertLinear(*weight.shape[:1], weight.shape[2], weight.shape[1], bias=True, dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer


def plain_copy(model):
    """A float model whose experts have the weights that the int8 ones stand for."""
    twin = copy.deepcopy(model)
    for name, layer in int8_layers(model).items():
        own = twin.get_submodule(name)
        dtype = own.weight_scale.dtype
        value = layer.weight.double().numpy() * layer.weight_scale.double().numpy()[..., None]
        del own.weight
        own.weight_scale = None
        own.weight = nn.Parameter(torch.from_numpy(value).to(dtype))
    return twin


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_as_defined(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 67, generator=generator) * torch.logspace(-4, 2, 15).view(3, 5, 1)
    weight[1, 2] = 0
    # 127 steps of 1/8: halves, which go to the even neighbour.
    weight[2, 4] = torch.randint(-254, 255, (67,), generator=generator) / 16
    weight[2, 4, 0] = 127 / 8
    layer = filled(dtype, weight)
    own = layer.weight.detach().double().numpy()
    assert vmoe_torch.quantize_experts(layer) is layer
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == dtype
    assert layer.weight.shape == (3, 5, 67)
    assert layer.weight_scale.shape == (3, 5)
    largest = np.abs(own).max(2)
    scale = layer.weight_scale.double().numpy()
    # Half a unit in the last place, of a normal number or next to 0.
    kinds = torch.finfo(dtype)
    error = np.maximum(largest / 127 * kinds.eps / 2, kinds.smallest_normal * kinds.eps)
    assert scale[1, 2] == 1
    assert (np.abs(scale - largest / 127) <= error)[largest > 0].all()
    assert scale[2, 4] == 1 / 8
    got = layer.weight.numpy()
    np.testing.assert_array_equal(got, np.rint(own / scale[..., None]))
    assert np.abs(got.astype(int)).max() == 127
    assert (np.abs(got * scale[..., None] - own) <= scale[..., None] / 2).all()
    # What it computes with: that product, rounded once.
    want = torch.from_numpy(got * scale[..., None]).to(dtype)
    assert torch.equal(layer.floating_weight(), want)
    x = torch.randn(4, 67, dtype=dtype)
    torch.testing.assert_close(layer(x), x @ want.transpose(1, 2) + layer.bias[:, None], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [1e-7, 6e-6, 8e-6, 1e-5])
def test_rows_next_to_0_in_half_precision(value):
    """Their step would be rounded down to one too short, or to 0."""
    weight = torch.full((1, 1, 3), value) * torch.tensor([1.0, -1.0, 0.5])
    layer = filled(torch.float16, weight)
    own = layer.weight.detach().double()
    vmoe_torch.quantize_experts(layer)
    scale = layer.weight_scale.double()
    assert 0 < scale <= max(1.0000001 * value / 127, 6e-8) + 6e-8
    assert (layer.weight.double() * scale - own).abs().max() <= scale.item() / 2


@pytest.mark.parametrize("case", ROUTED)
def test_models_compute_what_the_rounded_weights_do(case):
    model = dropping(**ROUTED[case])
    floats = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(IMAGES)
    assert vmoe_torch.quantize_experts(model) is model
    state = model.state_dict()
    changed = {name for name in state if name not in floats or not torch.equal(state[name], floats[name])}
    experts = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
    assert changed == experts | {f"{name}_scale" for name in experts}
    assert len(experts) >= 4
    got = model(IMAGES)
    assert torch.equal(got, plain_copy(model)(IMAGES))
    assert 0 < (got - before).abs().max() < 0.1 * before.abs().max() or case in ("threshold",)
    # Once is enough.
    state = copy.deepcopy(model.state_dict())
    vmoe_torch.quantize_experts(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_every_router_has_a_case():
    assert set(ROUTERS) <= set(ROUTED)


def test_float_models_have_no_new_names():
    model = dropping()
    assert not [name for name in model.state_dict() if "scale" in name]
    assert not [name for name, _ in model.named_buffers() if "scale" in name]
    assert weight_count(model) == sum(parameter.numel() for parameter in model.parameters())


def test_ensembles_and_upcycled_models():
    ensemble = randomized(tiny_model("eee_s32_last2_e8"))
    twin = plain_copy(vmoe_torch.quantize_experts(ensemble))
    images = torch.randn(2, 3, 32, 32)
    assert len(int8_layers(ensemble)) == 8
    assert torch.equal(ensemble(images), twin(images))
    # What is made sparse later is in floating point, until it is asked for.
    model = vmoe_torch.quantize_experts(dropping(moe_layers=[1]))
    more = vmoe_torch.upcycle(model, moe_layers=[0], num_experts=2)
    assert list(int8_layers(more)) == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert len(int8_layers(vmoe_torch.quantize_experts(more))) == 4
    assert more(IMAGES).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_autocast(dtype):
    model = vmoe_torch.quantize_experts(dropping(capacity_factor=4.0))
    want = model(IMAGES)
    other = copy.deepcopy(model).to(dtype)
    fc1 = other.blocks[0].mlp.fc1
    assert (fc1.weight.dtype, fc1.weight_scale.dtype, fc1.bias.dtype) == (torch.int8, dtype, dtype)
    got = other(IMAGES.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(model(IMAGES).float(), want, rtol=0.05, atol=0.05)


def test_memory_copies_and_meta():
    model = dropping()
    size = sum(value.nbytes for value in model.state_dict().values())
    experts = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, ExpertLinear))
    count = weight_count(model)
    vmoe_torch.quantize_experts(model)
    scales = sum(layer.weight_scale.nbytes for layer in int8_layers(model).values())
    assert sum(value.nbytes for value in model.state_dict().values()) == size - 3 * experts + scales
    assert weight_count(model) == count > sum(parameter.numel() for parameter in model.parameters())
    assert "int8" in repr(model.blocks[0].mlp.fc1)
    assert "int8" not in repr(dropping().blocks[0].mlp.fc1)
    want = model(IMAGES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), want)
    assert count_flops(model, IMAGES) == count_flops(dropping(), IMAGES)
    empty = vmoe_torch.quantize_experts(tiny_model(device="meta"))
    fc1 = empty.blocks[1].mlp.fc1
    assert fc1.weight.is_meta
    assert fc1.weight.dtype == torch.int8
    assert fc1.weight_scale.is_meta


def test_state_dicts_make_a_model_int8():
    model = vmoe_torch.quantize_experts(dropping())
    want, state = model(IMAGES), model.state_dict()
    other = dropping(weight_init="reset").to(torch.float64)
    own = other.blocks[0].mlp.fc1.weight.data_ptr()
    other.load_state_dict(state)
    fc1 = other.blocks[0].mlp.fc1
    # As for any weight, the model keeps its dtype.
    assert fc1.weight_scale.dtype == torch.float64
    assert fc1.weight.data_ptr() != own
    assert torch.equal(other.float()(IMAGES), want)
    assigned = dropping()
    assigned.load_state_dict(state, assign=True)
    assert assigned.blocks[0].mlp.fc1.weight is state["blocks.0.mlp.fc1.weight"]
    # Into one that is int8 already, and of some layers alone.
    again = vmoe_torch.quantize_experts(randomized(dropping()))
    again.load_state_dict(state)
    assert torch.equal(again(IMAGES), want)
    some = dropping()
    part = {name: value for name, value in state.items() if name.startswith("blocks.1.")}
    some.load_state_dict(part, strict=False)
    assert list(int8_layers(some)) == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


@pytest.mark.parametrize("kind", ["float into int8", "without scale", "float with scale", "shape", "adapter"])
def test_what_state_dicts_cannot_do(kind):
    model, state = dropping(), vmoe_torch.quantize_experts(dropping()).state_dict()
    key = "blocks.0.mlp.fc1.weight"
    said = f"{key} must be int8 exactly where there is a weight_scale, got "
    if kind == "float into int8":
        vmoe_torch.quantize_experts(model)
        state = dropping().state_dict()
        said = f"{key} must be int8, as in this model since quantize_experts, got torch.float32: load it into a new"
    elif kind == "without scale":
        del state[f"{key}_scale"]
        said += "torch.int8 without one"
    elif kind == "float with scale":
        state[key] = state[key].float()
        said += "torch.float32 with one"
    elif kind == "shape":
        state[key] = state[key][:2]
        said = f"size mismatch for {key}: "
    else:
        parametrize.register_parametrization(model.blocks[0].mlp.fc1, "weight", nn.Identity())
        said = f"{key} must be a plain parameter for int8 weights to replace it"
    before = model.blocks[0].mlp.fc1.floating_weight().clone()
    with pytest.raises(RuntimeError, match=said):
        model.load_state_dict(state, strict=False)
    assert torch.equal(model.blocks[0].mlp.fc1.floating_weight(), before)


def test_training_leaves_the_experts_and_reaches_the_rest():
    model = vmoe_torch.quantize_experts(dropping()).train()
    names = {name for name, _ in model.named_parameters()}
    assert "blocks.0.mlp.fc1.weight" not in names
    assert "blocks.0.mlp.fc1.bias" in names
    twin = plain_copy(model)
    for each in (model, twin):
        torch.manual_seed(0)
        each(IMAGES).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compile_export_trace_and_script():
    model = vmoe_torch.quantize_experts(dropping(depth=1))
    want = model(IMAGES)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(IMAGES), want)
    program = torch.export.export(model, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), want)
    torch.testing.assert_close(torch.jit.trace(model, (IMAGES,))(IMAGES), want)
    tokens = torch.randn(3, 17, 16)
    layer = model.blocks[0].mlp
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(tokens), layer(tokens))
    assert scripted.state_dict()["fc1.weight"].dtype == torch.int8


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scripts_are_saved_and_loaded(int8, bias):
    layer, file = MoeMlp(16, num_experts=4, bias=bias).eval(), io.BytesIO()
    if int8:
        vmoe_torch.quantize_experts(layer)
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    tokens = torch.randn(3, 17, 16)
    torch.testing.assert_close(torch.jit.load(file)(tokens), layer(tokens))


@pytest.mark.parametrize("width", [16, 128])
def test_exported_files_hold_every_expert(tmp_path, width):
    """Exporters fold small int8 weights into floating-point ones, and keep large ones."""
    model = vmoe_torch.quantize_experts(dropping(depth=1, embed_dim=width))
    program = export_program(model, torch.zeros(IMAGES.shape))
    save_pt2(program, tmp_path / "x.pt2")
    save_onnx(program, tmp_path / "x.onnx")
    for file in (program, tmp_path / "x.pt2", tmp_path / "x.onnx"):
        assert count_experts(file, model) == {"blocks.0.mlp": 4}
    (logits,) = onnxruntime.InferenceSession(tmp_path / "x.onnx").run(None, {"images": IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(IMAGES), rtol=0, atol=1e-4)
    if width == 128:
        experts = sum(layer.weight.numel() for layer in int8_layers(model).values())
        assert (tmp_path / "x.onnx").stat().st_size < 4 * weight_count(model) - 2 * experts
    model.blocks[0].mlp.fc1.weight[2, 0, 0] += 1
    with pytest.raises(ValueError, match=r"must hold blocks.0.mlp.fc1.weight of expert 2 on a way"):
        count_experts(tmp_path / "x.onnx", model)


def mesh():
    return SimpleNamespace(mesh_dim_names=("dp", "ep"))


@pytest.mark.parametrize(
    ("call", "purpose"),
    [
        (lambda model: vmoe_torch.prune_experts(model, 2), "to be dropped or averaged in blocks.0.mlp"),
        (lambda model: vmoe_torch.to_dense(model), "to be dropped or averaged in blocks.0.mlp"),
        (lambda model: parallelize(model, mesh()), "to be parallelised"),
        (lambda model: model.init_weights(), "to be initialised"),
        (lambda model: materialize(model, 0), "to be initialised"),
        (lambda model: model.blocks[0].mlp.fc1.reset_parameters(), "to be initialised"),
    ],
)
def test_what_needs_floating_point_refuses(call, purpose):
    model = vmoe_torch.quantize_experts(dropping())
    want = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"experts must be of floating point {purpose}, got int8 ones"):
        call(model)
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items() if torch.is_tensor(value))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize("kind", ["dense", "adapter", "mask", "quantised", "int", "nan"])
def test_what_cannot_become_int8_stays_as_it_was(kind):
    model = dropping()
    fc2 = model.blocks[1].mlp.fc2
    said = "experts must have plain floating-point parameters to become int8 .*blocks.1.mlp.fc2"
    if kind == "dense":
        model, said = tiny_model(moe_layers=()), "model must have at least one MoE layer, got VMoE without any"
    elif kind == "adapter":
        parametrize.register_parametrization(fc2, "weight", nn.Identity())
    elif kind == "mask":
        prune.random_unstructured(fc2, "weight", 0.5)
    elif kind in ("quantised", "int"):
        weight = fc2.weight.detach()
        del fc2.weight
        value = torch.quantize_per_tensor(weight, 0.01, 0, torch.qint8) if kind == "quantised" else weight.int()
        fc2.weight = nn.Parameter(value, requires_grad=False)
    else:
        fc2.weight.data[0, 0, 0] = float("nan")
        said = "experts' weights must be finite to become int8, got NaN or infinity in blocks.1.mlp.fc2"
    with pytest.raises(ValueError, match=said):
        vmoe_torch.quantize_experts(model)
    assert not int8_layers(model)


def test_one_layer_alone():
    layer = MoeMlp(16, num_experts=4).eval()
    vmoe_torch.quantize_experts(layer)
    assert list(int8_layers(layer)) == ["fc1", "fc2"]
    assert layer(torch.randn(2, 7, 16)).isfinite().all()
