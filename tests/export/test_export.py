"""Exported files give the model's logits, whatever the routing, and run where nothing of ours is installed."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import vmoe_torch
from vmoe_torch.export import check_compiled, check_file, export_program, save_onnx, save_pt2

SHAPE = (5, 1, 16, 16)
CASES = {
    "vanilla": {"batch_priority": False, "group_size": 2},
    "bpr": {"batch_priority": True, "group_size": 2},
    "sum": {"batch_priority": True, "priority": "sum", "group_size": "batch"},
    "one expert, average": {"num_selected_experts": 1, "class_token": False, "global_pool": "avg"},
    "as released": {"dispatch_dtype": "bfloat16", "act_layer": nn.GELU, "group_size": 4},
    "expert choice": {"router": "expert_choice", "group_size": 4},
    "renormalised": {"renormalize_gates": True, "num_selected_experts": 3, "capacity_factor": 0.2},
}


def _run(path, images):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"images": images.numpy()})[0]


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


@pytest.mark.parametrize("batch_priority", [False, True])
def test_equal_priorities_keep_their_order(build, tmp_path, batch_priority):
    """All patches of two grey levels: hundreds of tokens want the same slots with the same gates."""
    model = build(
        img_size=64, batch_priority=batch_priority, group_size="batch", capacity_factor=0.25, pos_embed="none"
    )
    images = (torch.arange(2 * 256) % 7 < 3).float().view(2, 1, 16, 16)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        want = model(images)
    save_onnx(export_program(model, images), tmp_path / "x.onnx")
    np.testing.assert_allclose(_run(tmp_path / "x.onnx", images), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_dynamic_batch(build, tmp_path):
    model = build(group_size="image", batch_priority=True)
    program = export_program(model, torch.zeros(1, *SHAPE[1:]), dynamic_batch=True)
    for suffix, save in ((".pt2", save_pt2), (".onnx", save_onnx)):
        path = tmp_path / f"x{suffix}"
        save(program, path)
        for batch in (1, 2, 7):
            assert check_file(path, model, (batch, *SHAPE[1:])) < 1e-4


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
    for suffix, save in ((".pt2", save_pt2), (".onnx", save_onnx)):
        path = tmp_path / f"x{suffix}"
        save(export_program(model, torch.zeros(SHAPE)), path)
        with (
            vmoe_torch.routing(model, capacity_factor=1.0),
            pytest.raises(
                ValueError, match=rf"x{suffix} must give the model's logits within 0.0001 .*, got differences"
            ),
        ):
            check_file(path, model, SHAPE)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="must give logits that differ"):
        check_file(path, model, SHAPE)


def test_compiled_model(build, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options))
    assert check_compiled(build(), SHAPE) < 1e-5


def test_what_is_wrong_is_named(build):
    model = build(group_size=2)
    with pytest.raises(ValueError, match=r"group_size must be 'image' for a dynamic batch, got 2 in blocks\.1\.mlp"):
        export_program(model, torch.zeros(SHAPE), dynamic_batch=True)
    with pytest.raises(ValueError, match="images must hold at least one, got none"):
        export_program(model, torch.zeros(0, *SHAPE[1:]))
