"""vmoe budget on a run: what it prints and writes, and one line for what a user gets wrong."""

import json

import torch

from tests.test_cli import fails
from vmoe_torch.budget import LayerSetting
from vmoe_torch.budget.settings import assign
from vmoe_torch.cli import main
from vmoe_torch.commands.sources import open_model
from vmoe_torch.evaluate import count_flops


def test_budget_is_set_budget_on_some_images(run_folder, image_folder, tmp_path, capsys):
    arguments = ["budget", run_folder, "--data", image_folder, "--flops=0.9", "--images=8", "--batch-size=8"]
    assert main([*map(str, arguments), f"--out={tmp_path}/x.json"]) == 0
    assert "0.9 of the present cost; 8 calibration images" in capsys.readouterr().out
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["labelled"]
    assert kept["chosen"]["cost"] <= kept["limit"]
    model = open_model(run_folder).model
    assign(model, {name: LayerSetting(**setting) for name, setting in kept["chosen"]["settings"].items()})
    assert count_flops(model, torch.zeros(8, 1, 28, 28)).total == kept["chosen"]["cost"]


def test_labels_may_stay_unseen(run_folder, image_folder, tmp_path, capsys):
    arguments = ["budget", run_folder, "--data", image_folder, "--split=val", "--latency=3", "--no-labels"]
    assert main([*map(str, arguments), f"--out={tmp_path}/x.json"]) == 0
    assert "agreement %" in capsys.readouterr().out
    kept = json.loads((tmp_path / "x.json").read_text())
    assert (kept["labelled"], kept["unit"], kept["images"]) == (False, "seconds", 12)


def test_what_a_user_gets_wrong(run_folder, image_folder, tmp_path, capsys):
    model = ["budget", run_folder, "--data", image_folder]
    fails(capsys, model, "one of flops and latency must be given")
    fails(capsys, [*model, "--flops=0.8", "--images=0"], "--images must be at least 1, got 0")
    fails(capsys, [*model, "--flops=0.8", "--batch-size=0"], "--batch-size must be at least 1, got 0")
    fails(capsys, [*model, "--flops=0.01"], "flops must be at least 0.", "the share of the cheapest setting")
    fails(capsys, [*model, "--flops=0.8", "--split=dev"], "split must be a folder in")
    fails(capsys, [*model, "--flops=0.8", "--out", tmp_path / "no" / "x"], "--out must be a file in a folder")
