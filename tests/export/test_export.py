"""Exported files give the model's logits, whatever the routing, and run where nothing of ours is installed."""

import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import vmoe_torch
from vmoe_torch.budget import LayerSetting
from vmoe_torch.export import check_compiled, check_file, export_program, save_onnx, save_pt2
from vmoe_torch.export.check import compare_logits

SHAPE = (5, 1, 16, 16)
SAVE = {".pt2": save_pt2, ".onnx": save_onnx}
# Batches of 5: groups of 2 or 4 leave a smaller last one.
CASES = {
    "vanilla, one expert, average": {
        "batch_priority": False,
        "num_selected_experts": 1,
        "group_size": 2,
        "class_token": False,
        "global_pool": "avg",
    },
    "bpr": {"batch_priority": True, "group_size": 2, "depth": 2},
    "sum, whole batch": {"batch_priority": True, "priority": "sum", "group_size": "batch"},
    "as released": {"dispatch_dtype": "bfloat16", "act_layer": nn.GELU, "group_size": 4},
    "threshold": {"gate_threshold": 0.35, "group_size": 4},
    "expert choice": {"router": "expert_choice", "group_size": 4},
    "renormalised": {"renormalize_gates": True, "num_selected_experts": 3, "capacity_factor": 0.2},
}


def _run(path, images):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"images": images.numpy()})[0]


def _dropped(model):
    return min(float(stats["dropped"]) for stats in vmoe_torch.routing_stats(model).values())


@pytest.mark.parametrize("case", CASES)
def test_files_give_the_models_logits(build, tmp_path, case):
    model = build(**CASES[case])
    program = export_program(model, torch.zeros(SHAPE))
    assert not [node for node in program.graph.nodes if "vmoe" in str(node.target)]
    save_pt2(program, tmp_path / "x.pt2")
    assert check_file(tmp_path / "x.pt2", model, SHAPE) < 1e-5
    save_onnx(program, tmp_path / "x.onnx")
    assert check_file(tmp_path / "x.onnx", model, SHAPE) < 1e-4
    assert {domain.domain for domain in onnx.load(tmp_path / "x.onnx").opset_import} <= {"", "pkg.onnxscript.torch_lib"}
    assert all(layer.impl == "auto" for layer in vmoe_torch.moe_layers(model).values())
    assert case == "expert choice" or _dropped(model) > 0.1


def test_soft_layers(build, tmp_path):
    """With a free batch, too: an image is a group."""
    model = build(router="soft", slots_per_expert=2, capacity_factor=1.05)
    program = export_program(model, torch.zeros(1, *SHAPE[1:]), dynamic_batch=True)
    for suffix, save in SAVE.items():
        path = tmp_path / f"x{suffix}"
        save(program, path)
        for batch in (1, 2, 7):
            assert check_file(path, model, (batch, *SHAPE[1:])) < 1e-4


def test_equal_priorities_keep_their_order(build, tmp_path):
    """All patches of two grey levels: hundreds of tokens want the same slots with the same gates."""
    model = build(img_size=64, batch_priority=True, group_size="batch", capacity_factor=0.25, pos_embed="none")
    images = (torch.arange(2 * 256) % 7 < 3).float().view(2, 1, 16, 16)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        want = model(images)
    save_onnx(export_program(model, images), tmp_path / "x.onnx")
    np.testing.assert_allclose(_run(tmp_path / "x.onnx", images), want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(("batch_priority", "selected"), [(False, 1), (True, 2)])
def test_dynamic_batch(build, tmp_path, batch_priority, selected):
    model = build(group_size="image", batch_priority=batch_priority, num_selected_experts=selected)
    program = export_program(model, torch.zeros(1, *SHAPE[1:]), dynamic_batch=True)
    for suffix, save in SAVE.items():
        path = tmp_path / f"x{suffix}"
        save(program, path)
        for batch in (1, 2, 7):
            assert check_file(path, model, (batch, *SHAPE[1:])) < 1e-4
            assert _dropped(model) > 0.1


def test_budget(build, tmp_path):
    """What `set_budget` chose for each layer is what the file does."""
    model = build(depth=2, group_size="image", capacity_factor=1.05)
    images = torch.randn(16, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
    settings = [LayerSetting(k, capacity) for k, capacity in ((2, 1.05), (2, 0.3), (1, 0.5))]
    budget = vmoe_torch.set_budget(model, flops=0.9, data=[images], settings=settings, rounds=1)
    assert not budget.chosen.alike
    with torch.no_grad():
        want = model(images)
    save_onnx(export_program(model, images, dynamic_batch=True), tmp_path / "x.onnx")
    got = _run(tmp_path / "x.onnx", images)
    atol = 1e-4 * float(want.abs().max())
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    assert float((want - before).abs().max()) > 10 * atol


def test_pt2_needs_torch_alone(build, tmp_path):
    model = build()
    images = torch.randn(SHAPE)
    save_pt2(export_program(model, images), tmp_path / "x.pt2")
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "data.pt")
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("vmoe_kernels", "vmoe_torch", "timm")))
import torch
images, want = torch.load({str(tmp_path / "data.pt")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "x.pt2")!r}).module()(images), want)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_model_is_told_apart(build, tmp_path):
    model = build()
    path = tmp_path / "x.pt2"
    save_pt2(export_program(model, torch.zeros(SHAPE)), path)
    differs = r"x.pt2 must give the model's logits within 0.0001 .*, got differences"
    with vmoe_torch.routing(model, capacity_factor=1.0), pytest.raises(ValueError, match=differs):
        check_file(path, model, SHAPE)
    with pytest.raises(ValueError, match=r"x.pt2 must give logits \(5, 4\), got \(4, 5\)"):
        compare_logits("x.pt2", lambda images: torch.zeros(4, 5), model, SHAPE)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="must give logits that differ"):
        check_file(path, model, SHAPE)


@pytest.mark.parametrize(("wire", "error"), [("float32", 5e-5), ("bfloat16", 1e-3)])
def test_rounding_is_told_from_errors(build, wire, error):
    """What a bfloat16 model may differ by is too much for a float32 one."""
    model = build(dispatch_dtype=wire)

    def compare(difference):
        return compare_logits("other", lambda images: model(images) * (1 + difference), model, SHAPE)

    assert compare(error) == pytest.approx(error, rel=0.01)
    with pytest.raises(ValueError, match="other must give the model's logits within"):
        compare(4 * error)


@pytest.mark.parametrize("case", ["vanilla, one expert, average", "bpr", "as released"])
def test_graph_of_compile(build, monkeypatch, case):
    """One graph, without the code that inductor makes of it."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options))
    assert check_compiled(build(**CASES[case]), SHAPE) < 1e-5


@pytest.mark.slow
def test_compiled_model(build):
    assert check_compiled(build(), SHAPE) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor compiles C++, and there is no compiler")
def test_program_compiled_ahead_of_time(build, tmp_path):
    model = build(batch_priority=True, group_size="image")
    program = export_program(model, torch.zeros(SHAPE), dynamic_batch=True)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    assert compare_logits("AOTInductor", compiled, model, SHAPE) < 1e-4
    assert compare_logits("AOTInductor", compiled, model, (2, *SHAPE[1:])) < 1e-4


def test_what_is_wrong_is_named(build):
    model = build(group_size=2)
    with pytest.raises(ValueError, match=r"group_size must be 'image' for a dynamic batch, got 2 in blocks\.0\.mlp"):
        export_program(model, torch.zeros(SHAPE), dynamic_batch=True)
    with pytest.raises(ValueError, match="images must hold at least one, got none"):
        export_program(model, torch.zeros(0, *SHAPE[1:]))
