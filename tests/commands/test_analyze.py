"""`vmoe analyze` from end to end on tiny models, and what a user can get wrong."""

import csv
import json

import pytest
import torch

import vmoe_torch
from tests.helpers.browser import browser_test, check_page
from tests.tiny import small_config
from vmoe_torch.analyze import analyze, sample
from vmoe_torch.cli import main
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import open_model
from vmoe_torch.evaluate import RoutingSetting, evaluate
from vmoe_torch.train import train

LAYERS = ["blocks.0.mlp", "blocks.1.mlp"]
# Two curves, an animation, loads, gates, random routers, numbers of experts; and three of each layer.
PICTURES = 7 + 3 * len(LAYERS)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """Folder of a dense run of two updates."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    train(small_config(folder).override("model.kwargs.moe_layers=[]"))
    return folder


@pytest.fixture(scope="module")
def report(run_folder, dense_run, tmp_path_factory):
    """Folder of a report on 48 images."""
    out = tmp_path_factory.mktemp("reports") / "new" / "report"
    options = [
        f"--dense={dense_run}",
        f"--out={out}",
        "--images=48",
        "--seed=3",
        "--capacity=1,0.25",
        "--batch-size=32",
    ]
    assert main(["analyze", str(run_folder), "--data=fashion_mnist", *options]) == 0
    return out


@browser_test
def test_report_opens_in_a_browser(report, tmp_path):
    check_page(report / "report.html", tmp_path, PICTURES)


def test_report_holds_what_was_measured(report, run_folder, dense_run):
    found = json.loads((report / "report.json").read_text())
    page = (report / "report.html").read_text(encoding="utf-8")
    source, dense = open_model(run_folder), open_model(dense_run)
    images = sample(open_images(source, "fashion_mnist"), 48, 3)
    loader = torch.utils.data.DataLoader([(source.transform(image), label) for image, label in images], 32)

    settings = [
        RoutingSetting(),
        *(RoutingSetting(c, k, p) for k in (2, 1) for c in (1.0, 0.25) for p in (False, True)),
    ]
    own, *grid = evaluate(source.model, loader, settings)
    assert found["own"]["top1"] == own.top1
    assert [row["loss"] for row in found["grid"]] == pytest.approx([e.loss for e in grid])
    (other,) = evaluate(dense.model, loader)
    assert found["dense"]["name"] == "dense"
    assert found["dense"]["top1"] == other.top1
    assert found["dense"]["flops"] == other.flops.total
    assert "dense, on the same images, reaches" in page
    assert [row["num_selected_experts"] for row in found["experts_per_token"]] == [1, 2, 4]

    assert [row["layers"] for row in found["random_routers"]] == [[], LAYERS[:1], LAYERS[1:], LAYERS]
    assert found["random_routers"][0]["top1"] == own.top1
    layer = found["layers"]["blocks.1.mlp"]
    # 2 x 2 patches, 2 choices each.
    assert sum(map(sum, layer["wanted"])) == 48 * 4 * 2
    assert layer["capacity_factor"] == pytest.approx(own.capacity_factor)
    assert sum(found["layers"][name]["dropped"] for name in LAYERS) / 2 == pytest.approx(own.dropped)
    labels = [label for _, label in images]
    assert [sum(row) for row in layer["wanted"]] == [4 * 2 * labels.count(label) for label in range(10)]
    places = torch.tensor(layer["positions"])
    assert places.shape == (2, 2, 4)
    assert places.sum() == sum(map(sum, layer["kept"]))
    assert found["kept_patches"]["capacity_factors"][0] == 1.0
    with open(report / "results.csv", newline="") as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [e.top1 for e in grid]


def test_report_has_its_pictures_beside_it(report):
    page = (report / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == len([*report.glob("*.png"), *report.glob("*.gif")]) == PICTURES
    assert "48 of 2,000 images, drawn with seed 3" in page
    # Nothing from elsewhere, and nothing that runs.
    assert "http" not in page
    assert "<script" not in page


def test_without_a_dense_model_the_text_says_why(run_folder, image_folder, tmp_path):
    source = open_model(run_folder)
    images = open_images(source, image_folder)
    before = vmoe_torch.moe_layers(source.model)["blocks.1.mlp"].__dict__.copy()
    source.model.train()
    found = analyze(
        source.model, images, source.transform, source.class_names, capacity_factors=(0.5,), num_selected_experts=(1,)
    )
    assert source.model.training
    after = vmoe_torch.moe_layers(source.model)["blocks.1.mlp"].__dict__
    assert {key: after[key] for key in before if key != "training"} == {
        key: before[key] for key in before if key != "training"
    }
    captions = [figure.caption for section in found.report("title").sections for figure in section.figures]
    assert sum("no line of a dense model, because none was given" in caption for caption in captions) == 1
    # The images show three classes; pictures are of each of them first.
    assert set(found.patches.class_names[:3]) == {"trouser", "sandal", "bag"}
    assert len(found.patches.class_names) == 8


def fails(capsys, arguments, message):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_a_user_gets_wrong(run_folder, dense_run, image_folder, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    shown = ["--data", "fashion_mnist", *out]
    fails(capsys, ["analyze", dense_run, *shown], "model must have at least one MoE layer, got VMoE without any")
    fails(capsys, ["analyze", run_folder, *shown, "--images=0"], "--images must be at least 1, got 0")
    fails(capsys, ["analyze", run_folder, *shown, "--k=9"], "num_selected_experts must be in 1..num_experts=4, got 9")
    fails(capsys, ["analyze", run_folder, *shown, "--capacity=0"], "capacity_factor must be above 0, got 0")
    fails(capsys, ["analyze", run_folder, *shown, "--dense", "runs/none"], "must be a run folder")
    hats = tmp_path / "hats"
    hats.mkdir()
    fails(
        capsys, ["analyze", run_folder, "--data", hats, *out], "must hold one folder of images per class, got no image"
    )
    (hats / "hat").symlink_to(image_folder / "val" / "bag")
    fails(capsys, ["analyze", run_folder, "--data", hats, *out], "must be among the 10 expected, got hat too")
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below"):
        fails(
            capsys,
            ["analyze", run_folder, "--data", "fashion_mnist", "--out", place],
            "--out must be a folder that can be written to, got",
        )
    assert not (tmp_path / "out").exists()
