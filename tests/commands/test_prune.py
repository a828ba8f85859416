"""vmoe prune on a run: what it writes is a MODEL of every command, and one line for what a user gets wrong."""

from dataclasses import replace

import pytest
import timm
import torch

import vmoe_torch
from tests.test_cli import fails
from tests.tiny import randomized, tiny_model
from vmoe_torch.cli import main
from vmoe_torch.commands.sources import open_model
from vmoe_torch.models.pruning import kept_experts

IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(2))


def experts_of(model):
    return [layer.num_experts for layer in vmoe_torch.moe_layers(model).values()]


@pytest.mark.parametrize(("keep", "left"), [("3", 3), ("0.5", 2), ("1", 1)])
def test_by_use(run_folder, tmp_path, capsys, keep, left):
    out = tmp_path / "small.pt"
    data = ["--data=fashion_mnist", "--split=test", "--images=40", "--batch-size=16"]
    assert main(["prune", str(run_folder), str(out), f"--keep={keep}", *data]) == 0
    said = capsys.readouterr()
    assert "of 4\n" in said.out
    assert "small.pt: 0.0" in said.out
    source = open_model(out)
    assert experts_of(source.model) == [left] * 2
    assert source.class_names == open_model(run_folder).class_names
    assert main(["eval", str(out), "--data=fashion_mnist", "--split=test", "--capacity=1.0"]) == 0


def test_by_the_weights_before(run_folder, tmp_path, capsys):
    out = tmp_path / "small.pt"
    model = open_model(run_folder).model
    for layer in vmoe_torch.moe_layers(model).values():
        layer.router.weight.data[[1, 2]] += 0.5
    torch.save(model.state_dict(), tmp_path / "before.pt")
    assert main(["prune", str(run_folder), str(out), "--keep=2", f"--before={tmp_path / 'before.pt'}"]) == 0
    assert "experts 1, 2 of 4" in capsys.readouterr().out
    mine = open_model(run_folder).model
    want = vmoe_torch.prune_experts(mine, kept_experts(mine, 2, before=model))
    assert torch.equal(open_model(out).model(IMAGES), want(IMAGES))


@pytest.mark.parametrize("weighed", [False, True])
def test_dense(run_folder, tmp_path, capsys, weighed):
    out = tmp_path / "dense.pt"
    data = ["--data=fashion_mnist", "--split=test", "--images=40"] if weighed else []
    assert main(["prune", str(run_folder), str(out), "--average", *data]) == 0
    assert "the average of 4 experts" in capsys.readouterr().out
    model = open_model(out).model
    assert not vmoe_torch.moe_layers(model)
    want = vmoe_torch.to_dense(open_model(run_folder).model)
    assert torch.equal(model(IMAGES), want(IMAGES)) != weighed
    assert main(["export", str(out), str(tmp_path / "x.pt2")]) == 0


def test_models_of_no_run(tmp_path, capsys):
    model = randomized(tiny_model())
    timm.models.save_for_hf(model, tmp_path / "hub")
    torch.save(model.state_dict(), tmp_path / "before.pt")
    out = tmp_path / "small.pt"
    before = f"--before={tmp_path / 'before.pt'}"
    assert main(["prune", str(tmp_path / "hub"), str(out), "--keep=2", before]) == 0
    assert experts_of(open_model(out).model) == [2, 2]


def test_a_run_with_a_mean_of_more_experts_than_are_left(tmp_path):
    kwargs = {"img_size": 32, "mean_selected_experts": 1.5, "gate_threshold": 0.1}
    model = randomized(timm.create_model("test_vmoe", num_classes=2, **kwargs))
    config = {"model": {"name": "test_vmoe", "kwargs": kwargs}, "data": {"name": "fashion_mnist"}}
    run = {"format": 1, "config": config, "class_names": ["a", "b"], "model": model.state_dict(), "ema": None}
    torch.save(run, tmp_path / "run.pt")
    torch.save(randomized(timm.create_model("test_vmoe")).state_dict(), tmp_path / "before.pt")
    out = tmp_path / "small.pt"
    assert main(["prune", str(tmp_path / "run.pt"), str(out), "--keep=1", f"--before={tmp_path / 'before.pt'}"]) == 0
    layers = vmoe_torch.moe_layers(open_model(out).model)
    assert [(layer.num_experts, layer.mean_selected_experts) for layer in layers.values()] == [(1, 1.0)] * 3


def test_what_a_user_gets_wrong(run_folder, tmp_path, capsys):
    start = ["prune", run_folder, tmp_path / "x.pt"]
    fails(capsys, [*start[:2], tmp_path / "x.onnx", "--average"], "OUT must end in .pt, got")
    fails(capsys, start, "one of --keep and --average must be given, got neither")
    fails(capsys, [*start, "--keep=2", "--average"], "one of --keep and --average must be given, got both")
    fails(capsys, [*start, "--keep=2"], "one of --before and --data must be given, got neither")
    fails(capsys, [*start, "--keep=2", "--before=x", "--data=y"], "--before and --data must be given, got both")
    fails(capsys, [*start, "--average", "--before=x"], "--before must go with --keep, got it with --average")
    fails(capsys, [*start, "--keep=0", "--before=x"], "--keep must be above 0 and finite, got 0")
    fails(capsys, [*start, "--keep=9", f"--before={run_folder}"], "keep must be in 1..4 in blocks.0.mlp, got 9")
    assert not (tmp_path / "x.pt").exists()


def test_models_that_cannot_be_pruned_are_refused_before_images_are_read(run_folder, tmp_path, capsys):
    data, out = "--data=/nowhere", tmp_path / "x.pt"
    fails(capsys, ["prune", run_folder, out, "--keep=9", data], "keep must be in 1..4 in blocks.0.mlp, got 9")
    kinds = {"router": "threshold"}, {"expert_hidden": [1.0, 1.0, 0.5, 0.0]}
    for kind, way, said in zip(kinds, ("--keep=2", "--average"), ("router must be 'top_experts' or", "of one size")):
        torch.save(tiny_model(num_experts=4, **kind).state_dict(), tmp_path / "model.pt")
        assert main(["prune", str(tmp_path / "model.pt"), str(out), way, data]) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_upcycled_is_refused_before_images_are_read(run_folder, tmp_path, monkeypatch, capsys):
    source = open_model(run_folder)
    upcycled = replace(source, config=source.config.override("model.upcycle.num_experts=4"))
    monkeypatch.setattr("vmoe_torch.commands.prune.open_model", lambda *_, **__: upcycled)
    command = ["prune", run_folder, tmp_path / "x.pt", "--keep=2", "--data=/nowhere"]
    fails(capsys, command, "MODEL must not be of a run that upcycled")
