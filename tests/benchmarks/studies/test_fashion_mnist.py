"""The Fashion-MNIST study: tiny runs from end to end, and what its report makes of numbers."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.harness.results import RESULTS
from benchmarks.studies import fashion_mnist
from benchmarks.studies.fashion_mnist import execute, forward_flops, main, plan
from benchmarks.studies.fashion_mnist_report import differences, figure, grid, markdown, sentences
from tests.tiny import write_fashion_mnist
from vmoe_torch.recipes import fashion_mnist_dense, load_recipe

IMAGES = 128
TINY = ["data.batch_size=32", "schedule.epochs=1", "data.eval_batch_size=64", "model.kwargs.depth=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of IDX files with a few images."""
    folder = tmp_path_factory.mktemp("images")
    write_fashion_mnist(folder, IMAGES, IMAGES)
    return folder


def result(model, seed, top1, gain=0.0):
    """A run's result; of a V-MoE, BPR gains so much over vanilla wherever the capacity is below 1."""
    found = {
        "model": model,
        "seed": seed,
        "epochs": 1,
        "updates": 10,
        "images": 640,
        "parameters": 1000,
        "training_flops": 2e12,
        "training_seconds": 1.0,
        "top1": top1,
    }
    if model == "vmoe":
        found["settings"] = [
            {
                "num_selected_experts": 2,
                "capacity_factor": capacity,
                "actual_capacity_factor": capacity + 0.01,
                "batch_priority": priority,
                "images": 100,
                "top1": top1 - (0.1 if capacity < 1 else 0.0) + (gain if priority and capacity < 1 else 0.0),
                "top5": 1.0,
                "loss": 0.5,
                "dropped": 0.0,
                "unprocessed": 0.0,
                "flops": 1e6 * capacity,
                "relative_flops": capacity,
            }
            for capacity in (1.05, 0.5, 0.25)
            for priority in (False, True)
        ]
    return found


def study(gains=(0.05, 0.05), dense=0.7):
    """Results of two seeds: V-MoEs of 80 and 82 % against dense models of one accuracy."""
    results = []
    for seed, gain in enumerate(gains):
        results.append(result("vmoe", seed, 0.8 + 0.02 * seed, gain))
        results += [result(model, seed, dense) for model in ("dense_steps", "dense_flops")]
    return results


def test_study_trains_evaluates_and_writes_once(root, tmp_path, monkeypatch):
    arguments = [*TINY, "--root", str(root), "--seeds", "3", "--jobs", "1"]
    arguments += ["--runs", str(tmp_path / "runs")]
    arguments += ["--out", str(tmp_path / "out"), "--figures", str(tmp_path / "out")]
    path = main(arguments)
    assert path == tmp_path / "out" / "results.md"
    assert (tmp_path / "out" / "capacity_curve.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = {run["model"]: run for run in content["runs"]}
    assert {name: run["updates"] for name, run in runs.items()} == {"vmoe": 4, "dense_flops": 8, "dense_steps": 4}
    settings = runs["vmoe"]["settings"]
    assert len(settings) == 20
    assert all(row["images"] == IMAGES for row in settings)
    # The end of the training evaluated as trained: vanilla, two experts, capacity 1.05.
    assert settings[0]["top1"] == pytest.approx(runs["vmoe"]["top1"])
    flops = {name: run["training_flops"] for name, run in runs.items()}
    assert flops["dense_steps"] < flops["vmoe"] <= flops["dense_flops"]
    assert "settings" not in runs["dense_flops"]

    # What is done is not done again; in this process, which saves seconds.
    monkeypatch.setattr(fashion_mnist, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    before = path.read_text()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.pt")}
    main(arguments)
    assert path.read_text() == before
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.pt")} == times


def test_run_that_was_stopped_has_no_result(root, tmp_path):
    run = plan([0], root, tmp_path, [*TINY, "run.max_updates=1"])[0]
    with pytest.raises(RuntimeError, match=r"vmoe_0 was stopped after 1 updates; start again to go on"):
        execute(run)
    assert not list(tmp_path.rglob("result.json"))


def test_plan_gives_the_dense_model_as_many_flops_in_whole_epochs(tmp_path):
    runs = plan([0, 7], tmp_path, tmp_path / "runs")
    assert [(run.model, run.seed) for run in runs] == [
        (model, seed) for seed in (0, 7) for model in ("vmoe", "dense_flops", "dense_steps")
    ]
    sparse, more, same = (run.config for run in runs[3:])
    assert sparse.run.seed == more.run.seed == same.run.seed == 7
    assert sparse.schedule.epochs == same.schedule.epochs
    epochs = sparse.schedule.epochs * forward_flops(sparse) / forward_flops(same)
    assert 0 <= more.schedule.epochs - epochs < 1
    for name in ("embed_dim", "depth", "num_heads", "patch_size"):
        assert sparse.model.kwargs[name] == same.model.kwargs[name]
    assert len({run.config.run.output for run in runs}) == len(runs)


def test_stated_epochs_of_the_dense_recipe_are_those_of_the_study(tmp_path):
    stated = re.search(r"schedule\.epochs=(\d+)", fashion_mnist_dense.__doc__)[1]
    assert plan([0], tmp_path, tmp_path)[1].config.schedule.epochs == int(stated)


def test_recipes_differ_in_the_experts_alone():
    sparse, dense = (load_recipe(name).to_dict() for name in ("fashion_mnist", "fashion_mnist_dense"))
    assert dense["model"]["kwargs"].pop("moe_layers") == []
    assert sparse["model"]["kwargs"].pop("moe_layers") == "every1"
    sparse["run"].pop("output"), dense["run"].pop("output")
    assert sparse == dense


def test_differences_pair_the_runs_of_a_seed():
    mixed = study((0.05, -0.01))
    for results in (mixed, mixed[::-1]):
        assert differences(grid(results)[2, 0.25]) == pytest.approx([5, -1])
        assert differences(grid(results)[2, 1.05]) == pytest.approx([0, 0])
        assert differences(grid(results)[2, 1.05], "loss") == [0, 0]


def test_sentences_say_which_way_the_numbers_fall():
    text = "\n".join(sentences(study()))
    assert (
        "At equal steps the V-MoE is 11.00 points better than the dense ViT, 2 of 2 seeds agreeing (+10.00, +12.00)."
        in text
    )
    assert "BPR is at least as good as vanilla at every capacity of 0.5 or less, in all 4 comparisons" in text
    assert "The largest gain of BPR is 5.00 points, at K=2 and C=0.5: 76.0 against 71.0 %." in text
    assert "BPR changes by -5.00 at C=0.5, -5.00 at C=0.25 points" in text
    assert "vanilla changes by -10.00 at C=0.5, -10.00 at C=0.25 points" in text

    text = "\n".join(sentences(study((0.05, -0.01), dense=0.81)))
    assert "0.00 points worse than the dense ViT" in text
    assert "BPR is worse than vanilla for some seed at a capacity of 0.5 or less: K=2, C=0.5 (+5.00, -1.00); " in text
    assert "at least as good" not in text


def test_markdown_has_every_model_and_setting():
    lines = markdown(study(), {"machine": "some", "command": "this"})
    text = "\n".join(lines)
    assert "machine some, command this." in text
    assert "| V-MoE | 1 | 10 | 2.00 | 1,000 | 81.00 ± 1.41 | 80.00, 82.00 |" in lines
    assert sum(line.startswith("| dense, ") for line in lines) == 2
    assert "| 2 | 0.25 | 0.25 | 0.25 | 71.00 ± 1.41 | 76.00 ± 1.41 | +5.00 | +5.00, +5.00 | 0.500 | 0.500 |" in lines
    one_seed = markdown(study((0.1,)), {})
    assert "| V-MoE | 1 | 10 | 2.00 | 1,000 | 80.00 | 80.00 |" in one_seed


def test_figure_shows_means_bands_and_dense_levels():
    axes = figure(study(dense=0.6)).axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert {"BPR, K=2", "vanilla, K=2", "dense, equal steps", "dense, equal training FLOPs"} == set(labels)
    line = next(line for line in axes.get_lines() if line.get_label() == "BPR, K=2")
    assert list(line.get_ydata()) == pytest.approx([76, 76, 81])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    # BPR of the two seeds: from 75 and 77 at small capacities to 80 and 82.
    assert (band.min(), band.max()) == pytest.approx((75, 82))
    low, high = axes.get_ylim()
    assert low < 60
    assert high > 82


def test_committed_result_says_what_its_json_holds():
    path = RESULTS / "fashion_mnist" / "results.json"
    content = json.loads(path.read_text())
    lines = markdown(content["runs"], content["environment"])
    assert path.with_suffix(".md").read_text() == "\n".join(lines) + "\n"
