"""Tools that record or count operators: traces, ONNX by PyTorch's own exporters, FLOP counters, quantised weights."""

import inspect
import warnings

import numpy as np
import pytest
import timm
import torch
from timm.utils import onnx as timm_onnx
from torch import nn

import vmoe_torch
from tests.tiny import dropping, grey_images
from vmoe_torch.evaluate import count_flops, ptflops_hooks
from vmoe_torch.layers import ExpertLinear

# Their own messages, and the tracer's about timm's checks of image sizes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning:torch.onnx",
)
IMAGES = grey_images()
# Batches of 5: groups of 2 or 4 leave a smaller last one.
CASES = {
    "default": {},
    "vanilla": {"batch_priority": False, "num_selected_experts": 1, "group_size": 2},
    "sum": {"priority": "sum", "group_size": "batch"},
    "as released": {"dispatch_dtype": "bfloat16", "act_layer": nn.GELU, "group_size": 4},
    "expert choice": {"router": "expert_choice", "group_size": 4},
    "soft": {"router": "soft", "slots_per_expert": 2, "capacity_factor": 1.05},
    "renormalised": {"renormalize_gates": True, "num_selected_experts": 3, "group_size": 2},
    "images": {"group_size": "image"},
}
# What a graph with shapes or branches that depend on values is made of.
DEPENDENT = {"If", "Loop", "Scan", "NonZero", "Compress", "Unique"}


def assert_close(got, want):
    atol = 1e-5 * float(want.detach().abs().max())
    np.testing.assert_allclose(np.asarray(got), want.detach().numpy(), rtol=0, atol=atol)


def run_onnx(path, batch):
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


def export(model, path, dynamo, batch=IMAGES, dynamic=False):
    options = {"dynamo": dynamo, "input_names": ["x"]}
    if dynamic:
        options |= {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    if dynamo:
        options |= {"verbose": False}
    torch.onnx.export(model, (batch,), str(path), **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamo", [False, True], ids=["old exporter", "new exporter"])
def test_plain_onnx_export(tmp_path, case, dynamo):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = dropping(**CASES[case])
    want = model(IMAGES)
    export(model, tmp_path / "x.onnx", dynamo)
    assert_close(run_onnx(tmp_path / "x.onnx", IMAGES), want)
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert not DEPENDENT & {node.op_type for node in graph.node}
    stored = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    for layer in vmoe_torch.moe_layers(model).values():
        weight = layer.fc1.weight.detach().numpy()
        kept = [each for each in stored if each.size == weight.size and each.ndim == 3]
        assert any(np.array_equal(each.reshape(weight.shape), weight) for each in kept) or any(
            np.array_equal(each, weight.transpose(0, 2, 1)) for each in kept
        )


@pytest.mark.parametrize("dynamo", [False, True], ids=["old exporter", "new exporter"])
def test_onnx_keeps_equal_priorities_in_order(tmp_path, dynamo):
    """All patches of two grey levels: many tokens want the same slots with the same gates."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = dropping(img_size=64, group_size="batch", capacity_factor=0.25, pos_embed="none")
    batch = (torch.arange(2 * 256) % 7 < 3).float().view(2, 1, 16, 16)
    batch = batch.repeat_interleave(4, 2).repeat_interleave(4, 3)
    export(model, tmp_path / "x.onnx", dynamo, batch)
    assert_close(run_onnx(tmp_path / "x.onnx", batch), model(batch))


@pytest.mark.parametrize(
    ("dynamo", "settings"),
    [
        (False, {"group_size": "image"}),
        (True, {"group_size": "image"}),
        (True, {"group_size": 3, "capacity_rounding": "round"}),
    ],
    ids=str,
)
def test_onnx_with_a_dynamic_batch(tmp_path, dynamo, settings):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = dropping(**settings)
    export(model, tmp_path / "x.onnx", dynamo, dynamic=True)
    for count in (1, 3, 5, 8):
        assert_close(run_onnx(tmp_path / "x.onnx", grey_images(count)), model(grey_images(count)))


def test_onnx_of_shared_groups_refuses_another_batch(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    export(dropping(group_size=2), tmp_path / "x.onnx", dynamo=False, dynamic=True)
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    for count in (1, 4, 6):
        with pytest.raises(runtime.capi.onnxruntime_pybind11_state.Fail):
            session.run(None, {"x": grey_images(count).numpy()})


@pytest.mark.parametrize("use_dynamo", [False, True])
def test_timms_onnx_export(tmp_path, use_dynamo):
    """What timm's onnx_export.py calls, with its own check of the logits."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if use_dynamo and "use_dynamo" not in inspect.signature(timm_onnx.onnx_export).parameters:
        pytest.skip("this timm has one exporter")
    model, path = dropping(), str(tmp_path / "x.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_onnx.onnx_export(
            model, path, batch_size=2, input_size=(1, 16, 16), check_forward=True, use_dynamo=use_dynamo
        )
    assert_close(run_onnx(path, grey_images(2)), model(grey_images(2)))


def test_onnx_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be in eval mode for ONNX, got one in training mode"):
        torch.onnx.export(
            dropping().train(), (IMAGES,), str(tmp_path / "x"), dynamo=False, training=torch.onnx.TrainingMode.TRAINING
        )


@pytest.mark.parametrize("case", CASES)
def test_trace_checks_with_and_without_gradients(case):
    model = dropping(**CASES[case])
    want = model(IMAGES)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            traced = torch.jit.trace(model, (IMAGES,), check_trace=True)
            assert_close(traced(IMAGES).detach(), want)
    traced(IMAGES).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(IMAGES).sum().backward()
    for got, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-3)


def test_trace_of_single_image_groups_takes_any_batch():
    model = dropping(group_size="image")
    traced = torch.jit.trace(model, (IMAGES,))
    for count in (1, 3, 8):
        assert_close(traced(grey_images(count)).detach(), model(grey_images(count)))
    traced = torch.jit.trace(dropping(group_size=2), (IMAGES,))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        traced(grey_images(4))


def test_a_trace_leaves_no_statistics():
    model = dropping()
    torch.jit.trace(model, (IMAGES,), check_trace=False)
    assert vmoe_torch.routing_stats(model) == {}


def test_tensorboard_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    model = dropping()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, IMAGES)
    assert b"bmm" in b"".join(file.read_bytes() for file in tmp_path.iterdir()) or any(
        b"matmul" in file.read_bytes() for file in tmp_path.iterdir()
    )


@pytest.mark.parametrize("case", ["default", "vanilla", "expert choice", "images"])
def test_openvino_converts_a_module(case):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model = dropping(**CASES[case])
    converted = openvino.convert_model(model, example_input=IMAGES)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_close(compiled(IMAGES.numpy())[0], model(IMAGES))


@pytest.mark.parametrize("case", CASES)
def test_fvcore_counts_what_we_count(case):
    nn_ = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = dropping(**CASES[case])
        analysis = nn_.FlopCountAnalysis(model, IMAGES)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        products = sum(count for name, count in analysis.by_operator().items() if name != "layer_norm")
    finally:
        timm.layers.set_fused_attn(before)
    assert 2 * products == count_flops(model, IMAGES).total * len(IMAGES)


# With the pytorch backend, ptflops adds the activations of the twins, as of any module.
@pytest.mark.parametrize(("backend", "impl"), [("pytorch", "auto"), ("aten", "auto"), ("aten", "reference")])
@pytest.mark.parametrize("case", CASES)
def test_ptflops_hooks_count_a_layer(backend, case, impl):
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    layer = dropping(**CASES[case], impl=impl).blocks[0].mlp
    options = {"print_per_layer_stat": False, "verbose": False, "as_strings": False}
    count, _ = ptflops.get_model_complexity_info(
        layer, (17, 16), backend=backend, custom_modules_hooks=ptflops_hooks(), **options
    )
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counter:
        layer(torch.randn(1, 17, 16))
    # PyTorch's counter takes a multiply-add for two.
    assert 2 * count == counter.get_total_flops() > 0


@pytest.mark.parametrize("backward", [False, True])
def test_flop_counter_counts_alike_with_the_twins(backward):
    counts = []
    for impl in ("auto", "reference"):
        model = dropping(impl=impl)
        counter = torch.utils.flop_counter.FlopCounterMode(display=False)
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = model(IMAGES.requires_grad_())
            if backward:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    IMAGES.requires_grad_(False)
    assert counts[0] == counts[1]


def test_torchao_weight_only_experts():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = dropping(capacity_factor=4.0)
    want = model(IMAGES)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, ExpertLinear)
    )
    layer = model.blocks[0].mlp
    assert type(layer.fc1.weight) is not nn.Parameter
    got = model(IMAGES)
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
    for part in (layer.fc1, layer.fc2):
        part.weight = nn.Parameter(part.weight.dequantize())
    torch.testing.assert_close(model(IMAGES), got)
    assert_close(torch.jit.trace(model, (IMAGES,))(IMAGES).detach(), got)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize("bits", [torch.qint8, torch.quint8])
def test_quantised_tensors_are_read(bits):
    model = dropping(capacity_factor=4.0)
    want = model(IMAGES)
    for layer in vmoe_torch.moe_layers(model).values():
        for part in (layer.fc1, layer.fc2):
            weight = part.weight.detach()
            zero = 128 if bits == torch.quint8 else 0
            del part.weight
            part.weight = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, zero, bits)
    assert 0 < (model(IMAGES) - want).abs().max() < 0.1 * want.abs().max()
