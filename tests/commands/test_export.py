"""vmoe export on a run: files that onnxruntime and torch run, and one line for what a user gets wrong."""

import json

import onnxruntime
import pytest
import torch

import vmoe_torch
from tests.test_cli import fails
from vmoe_torch.cli import main
from vmoe_torch.commands.sources import open_model
from vmoe_torch.export import files_of


def test_onnx_file_at_a_setting(run_folder, tmp_path, capsys):
    path = tmp_path / "x.onnx"
    setting = ["--batch-size=5", "--capacity=0.5", "--k=1", "--order=bpr", "--group-size=2"]
    assert main(["export", str(run_folder), str(path), *setting]) == 0
    assert "images (5, 1, 28, 28) to logits" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == [5, 1, 28, 28]
    model = open_model(run_folder).model
    vmoe_torch.set_routing(model, capacity_factor=0.5, num_selected_experts=1, batch_priority=True, group_size=2)
    images = torch.randn(5, 1, 28, 28)
    got = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(got, model(images).detach(), rtol=0, atol=1e-4)


def test_pt2_file_as_budgeted(run_folder, tmp_path, capsys):
    """Each layer gets the setting that the file names for it."""
    model = open_model(run_folder).model
    first, second = vmoe_torch.moe_layers(model)
    setting = {"num_selected_experts": 1, "eval_capacity_factor": 0.3, "batch_priority": True}
    chosen = {first: setting, second: {**setting, "num_selected_experts": 2, "batch_priority": False}}
    (tmp_path / "b.json").write_text(json.dumps({"chosen": {"settings": chosen}}))
    path = tmp_path / "x.pt2"
    assert main(["export", str(run_folder), str(path), "--batch-size=4", f"--budget={tmp_path}/b.json"]) == 0
    images = torch.randn(4, 1, 28, 28)
    before = model(images)
    for name, setting in chosen.items():
        vmoe_torch.set_routing(model, layers=[name], **setting)
    want = model(images)
    assert not torch.allclose(want, before)
    torch.testing.assert_close(torch.export.load(path).module()(images), want)


def test_file_that_differs_does_not_stay(run_folder, tmp_path, capsys, monkeypatch):
    """What was there does."""
    (tmp_path / "x.pt2").write_text("earlier")
    monkeypatch.setattr("vmoe_torch.export.check.TOLERANCE", -1.0)
    fails(capsys, ["export", run_folder, tmp_path / "x.pt2"], "x.pt2 must give the model's logits within")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"]


def test_weights_beside_a_large_file(run_folder, tmp_path, capsys, monkeypatch):
    """They are read from there, and counted."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    path, weights = tmp_path / "x.onnx", tmp_path / "x.onnx.data"
    assert main(["export", str(run_folder), str(path)]) == 0
    assert files_of(path) == [path, weights]
    assert f"{(path.stat().st_size + weights.stat().st_size) / 1e6:.1f} MB" in capsys.readouterr().out


def test_what_a_user_gets_wrong(run_folder, tmp_path, capsys):
    start = ["export", run_folder]
    fails(capsys, [*start, "x.pb"], "OUT must end in .pt2 or .onnx, got x.pb")
    fails(capsys, [*start, tmp_path / "none" / "x.onnx"], "OUT must be a file in a folder that exists")
    out = [*start, tmp_path / "x.onnx"]
    fails(capsys, [*out, "--batch-size=dynamic"], "group_size must be 'image' for a dynamic batch, got 8 in blocks")
    fails(capsys, [*out, "--k=9"], "num_selected_experts must be in 1..num_experts=4, got 9")
    fails(capsys, [*out, f"--budget={tmp_path}/no.json"], "--budget must be a file that vmoe budget wrote")
    fails(capsys, [*out, "--budget=b.json", "--k=1", "--order=bpr"], "layer, got --k --order as well")
    fails(capsys, [*out, "--budget=b.json", "--mean=1", "--threshold=0.3"], "layer, got --mean --threshold as well")
    for wrong in ("--batch-size=0", "--batch-size=all", "--group-size=none"):
        with pytest.raises(SystemExit, match="2"):
            main(["export", "x", "x.onnx", wrong])
        assert "must be at least 1, or" in capsys.readouterr().err
