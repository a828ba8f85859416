"""The study of `set_budget`: a tiny model from end to end, what its report makes of numbers, the committed result."""

import json
import shlex

import pytest
import timm
import torch
from PIL import Image

from benchmarks.harness.results import RESULTS
from benchmarks.studies.budget import main
from benchmarks.studies.budget_report import figure, markdown, sentences
from vmoe_torch.commands.sources import Source

IMAGES = {"train": 12, "test": 16}


def results():
    """Two budgets: at the larger one set_budget wins, at the smaller one the single setting does."""

    def quality(top1, loss):
        return {"top1": top1, "loss": loss}

    def budget(share, cost, own, other):
        chosen = {"cost": cost, "predicted_loss": 0.4, "loss": 0.41, "top1": 0.9}
        setting = {"num_selected_experts": 1, "eval_capacity_factor": share, "batch_priority": True}
        return {
            "share": share,
            "limit": share * 1e6,
            "images": 100,
            "chosen": {**chosen, "settings": {"blocks.0.mlp": setting}},
            "candidates": [{"name": "all layers K=1 C=0.5 BPR", "cost": 0.5e6}],
            "best_global": "all layers K=1 C=0.5 BPR",
            "test": own,
            "best_global_test": other,
        }

    single = quality(0.80, 0.5)
    return {
        "test_images": 1000,
        "present": {"cost": 1e6, "test": quality(0.85, 0.45)},
        "budgets": [budget(0.8, 0.7e6, quality(0.84, 0.46), single), budget(0.5, 0.5e6, quality(0.79, 0.51), single)],
        "alike": [
            {"setting": "K=1 C=0.5 BPR", "priority": True, "cost": 0.5e6, "test": single},
            {"setting": "K=1 C=0.7 vanilla", "priority": False, "cost": 0.7e6, "test": quality(0.83, 0.48)},
            {"setting": "K=1 C=0.1 BPR", "priority": True, "cost": 0.1e6, "test": quality(0.3, 2.0)},
        ],
    }


@pytest.fixture
def tiny(monkeypatch):
    """A model of random weights, and grey images of noise, stand for the run and the data."""
    torch.manual_seed(0)
    model = timm.create_model(
        "test_vmoe", img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=4
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def transform(image):
        return torch.tensor(list(image.tobytes())).view(1, 16, 16) / 255 - 0.5

    def images(source, data, split):
        pixels = torch.randint(256, (IMAGES[split], 256), dtype=torch.uint8).tolist()
        return [(Image.frombytes("L", (16, 16), bytes(own)), number % 4) for number, own in enumerate(pixels)]

    monkeypatch.setattr("benchmarks.studies.budget.open_model", lambda name: Source(model, transform, "L", None, None))
    monkeypatch.setattr("benchmarks.studies.budget.open_images", images)


def test_study_calibrates_on_training_images_and_measures_on_test_images(tiny, tmp_path):
    path = main(["runs/some", "--shares", "0.9", "--images", "99", "--out", str(tmp_path), "--figures", str(tmp_path)])
    content = json.loads(path.with_suffix(".json").read_text())
    (budget,) = content["budgets"]
    assert (budget["images"], content["test_images"]) == (IMAGES["train"], IMAGES["test"])
    assert budget["chosen"]["cost"] <= budget["limit"] == pytest.approx(0.9 * content["present"]["cost"])
    settings = {each["setting"]: each for each in content["alike"]}
    # Each single setting that was verified, in both orders.
    assert len(settings) == 2 * sum(each["name"].startswith("all layers") for each in budget["candidates"])
    name = budget["best_global"].removeprefix("all layers ")
    assert settings[name]["test"] == budget["best_global_test"]
    assert (tmp_path / "budget.png").stat().st_size > 10_000


def test_sentences_say_which_way_the_numbers_fall():
    first, second, *_, last = sentences(results())
    assert first.startswith("- Budget 0.8: +4.00 points of top-1 and -0.0400 of loss against the best single setting")
    assert first.endswith("+1.00 points of top-1 and -0.0200 of loss against the best of the test.")
    assert second.startswith(
        "- Budget 0.5: -1.00 points of top-1 and +0.0100 of loss against the best single setting, "
    )
    assert last == "One model, one draw of calibration images; 0.1 points are one image."


def test_markdown_has_every_budget_and_setting():
    lines = markdown(results(), {"machine": "some"})
    assert "| 0.8 | 0.700 | 84.00 | 0.4600 | 0.500 (K=1 C=0.5 BPR) | 80.00 | 0.5000 | 83.00 | 0.4800 |" in lines
    assert "| 0.5 | blocks.0.mlp | K=1 C=0.5 BPR |" in lines
    assert "| K=1 C=0.1 BPR | 0.100 | 30.00 | 2.0000 |" in lines


def test_figure_leaves_out_what_nobody_would_use():
    axes = figure(results()).axes[0]
    points = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert points["one setting for all layers, BPR"] == [0.5]
    assert points["set_budget, a setting for each layer"] == [0.46, 0.51]


def test_committed_result_holds():
    """At 0.8 no accuracy is lost against the best single setting, even the one chosen on the test images."""
    content = json.loads((RESULTS / "fashion_mnist" / "budget.json").read_text())
    environment = content.pop("environment")
    assert not any(word.startswith("/") for word in shlex.split(environment["command"]))
    assert "with changes" not in environment["commit"]
    budget = next(each for each in content["budgets"] if each["share"] == 0.8)
    assert budget["test"]["top1"] >= budget["best_global_test"]["top1"]
    assert budget["test"]["top1"] >= max(
        each["test"]["top1"] for each in content["alike"] if each["cost"] <= budget["limit"]
    )
    text = (RESULTS / "fashion_mnist" / "budget.md").read_text()
    assert text == "\n".join(markdown(content, environment)) + "\n"
