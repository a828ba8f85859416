"""Few-shot transfer of a model: features, choice of images, one strength over data sets, tables."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset

from vmoe_torch.evaluate import Task, fewshot, format_fewshot, write_fewshot
from vmoe_torch.evaluate.ridge import Ridge, shuffled_classes
from vmoe_torch.evaluate.transfer import collect_features

SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 2}


class Shades(Dataset):
    """Grey images, a class per shade, with noise; counts what is read."""

    def __init__(self, count: int, seed: int):
        generator = np.random.default_rng(seed)
        self.labels = generator.integers(0, 3, count)
        noise = generator.normal(0, 25, (count, 16, 16))
        self.pixels = np.clip(self.labels[:, None, None] * 60 + 60 + noise, 0, 255).astype(np.uint8)
        self.read = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.read.append(index)
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vmoe", num_classes=5, weight_init="jax", group_size="image", **SIZE)


@pytest.fixture
def tasks():
    parts = [Shades(count, seed) for seed, count in enumerate((40, 30, 50, 20))]
    return [
        Task(name, train, train.labels, test, 3)
        for name, train, test in zip("ab", parts[::2], parts[1::2], strict=True)
    ]


def test_fewshot_is_ridge_on_features(model, tasks):
    (result,) = fewshot(model, to_tensor, tasks[:1], shots=[5], seeds=[4], strengths=[2.0])
    train = torch.stack([to_tensor(image) for image, _ in tasks[0].train])
    test = torch.stack([to_tensor(image) for image, _ in tasks[0].test])
    rows = np.concatenate([order[:5] for order in shuffled_classes(tasks[0].labels, 3, 4)])
    with torch.no_grad():
        x, x_test = (model.eval().forward_head(model.forward_features(part), pre_logits=True) for part in (train, test))
    ridge = Ridge(x[rows], torch.from_numpy(tasks[0].labels[rows]), 3)
    right = ridge.predict(x_test, [2.0])[0] == torch.from_numpy(tasks[0].test.labels)
    assert result.accuracy == right.double().mean().item()
    assert (result.data, result.shots, result.seed, result.l2, result.test_images) == ("a", 5, 4, 2.0, 30)
    assert result.accuracy > 0.6


def test_only_images_that_are_shots_are_read(model, tasks):
    fewshot(model, to_tensor, tasks[:1], shots=[1, 2], seeds=[0, 1])
    orders = [shuffled_classes(tasks[0].labels, 3, seed) for seed in (0, 1)]
    assert sorted(tasks[0].train.read) == sorted({int(i) for order in orders for rows in order for i in rows[:2]})


def test_one_strength_per_number_of_shots(model, tasks):
    model.train()
    results = fewshot(model, to_tensor, tasks, shots=[1, 10], seeds=range(3))
    assert model.training
    assert [(r.data, r.shots, r.seed) for r in results] == [(d, n, s) for d in "ab" for n in (1, 10) for s in range(3)]
    for shots in (1, 10):
        assert len({result.l2 for result in results if result.shots == shots}) == 1
    mean = {shots: np.mean([result.accuracy for result in results if result.shots == shots]) for shots in (1, 10)}
    assert mean[10] > mean[1] > 1 / 3


def test_results_are_written_as_they_are(model, tasks, tmp_path):
    results = fewshot(model, to_tensor, tasks, shots=[1, 5], seeds=range(2))
    lines = format_fewshot(results).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].split()[:2] == ["a", "1"]
    assert "+-" in lines[2]
    assert "+-" not in format_fewshot(results[:1])
    write_fewshot(results, tmp_path / "x.csv")
    write_fewshot(results, tmp_path / "x.json")
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["accuracy"] for row in rows] == [result.accuracy for result in results]
    with open(tmp_path / "x.csv", newline="") as file:
        assert [{**row, "accuracy": float(row["accuracy"])}["accuracy"] for row in csv.DictReader(file)] == [
            row["accuracy"] for row in rows
        ]


def test_bad_input_is_refused(model, tasks):
    with pytest.raises(ValueError, match="tasks, seeds and strengths must hold one at least"):
        fewshot(model, to_tensor, [])
    with pytest.raises(ValueError, match=r"shots must be at least 1, got \(0, 5\)"):
        fewshot(model, to_tensor, tasks, shots=[0, 5])
    with pytest.raises(ValueError, match="loader must give at least one image"):
        collect_features(model, [])
    model.reset_classifier(5, "")
    with pytest.raises(ValueError, match="features must be one vector for each of 2 images"):
        collect_features(model, [(torch.zeros(2, 3, 16, 16), torch.zeros(2))])


def test_an_ensembles_features_are_the_mean_over_members(tasks):
    torch.manual_seed(0)
    size = {**SIZE, "num_experts": 4, "moe_layers": "last1"}
    model = timm.create_model("eee_s32_last2_e8", num_classes=5, weight_init="jax", group_size="image", **size)
    images = torch.randn(3, 3, 16, 16)
    features, labels = collect_features(model, [(images, torch.arange(3))])
    with torch.no_grad():
        members = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(features, (members[0::2] + members[1::2]) / 2)
    assert not torch.allclose(members[0::2], members[1::2])
    assert labels.tolist() == [0, 1, 2]
    (result,) = fewshot(model, to_tensor, tasks[:1], shots=[2])
    assert result.test_images == 30
