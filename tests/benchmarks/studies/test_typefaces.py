"""The study of typefaces: its splits, its arithmetic, and a whole run of it in a minute on matplotlib's fonts."""

import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from benchmarks.harness.results import RESULTS
from benchmarks.studies.fashion_mnist import FIGURES
from benchmarks.studies.typefaces import claims, figures, fonts, measure, pages, report, routers, runs, specialisation
from benchmarks.studies.typefaces.__main__ import main, page
from vmoe_torch.train import Config

FACES = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_families_to_test_and_to_validate_on_are_never_trained_on():
    names = (
        "setofont.ttf",
        "setofont-ex.ttf",
        "LXGWWenKai-Bold.ttf",
        "LXGWWenKai-Regular.ttf",
        "YOzRC_.ttf",
        "ipag.ttf",
    )
    parts = fonts.split(map(Path, names))
    assert {name: [file.name for file in files] for name, files in parts.items()} == {
        "train": ["ipag.ttf"],
        "val": ["YOzRC_.ttf"],
        "test": ["LXGWWenKai-Regular.ttf", "setofont.ttf"],
    }


def test_characters_are_those_of_the_standard():
    learned = fonts.kanji(fonts.LEVEL_1)
    assert len(learned) == runs.CLASSES == 2965
    assert (learned[0], learned[-1]) == ("亜", "腕")
    tasks = fonts.scripts()
    assert all(len(set(characters)) == len(characters) for characters in tasks.values())
    assert not set(learned).intersection(*map(set, tasks.values()))


def test_fonts_without_the_characters_are_left_out(tmp_path):
    shutil.copy(FACES / "DejaVuSans.ttf", tmp_path)
    (tmp_path / "link.ttf").symlink_to(tmp_path / "DejaVuSans.ttf")
    found = fonts.covering(fonts.font_files(tmp_path), "AB鬱", least=2)
    assert [file.name for file in found] == ["DejaVuSans.ttf"]
    with pytest.raises(ValueError, match="apt-get install fonts-"):
        fonts.prepare(tmp_path / "study", tmp_path)


def test_what_chooses_settings_sees_no_test_typeface():
    assert not any(run.tested for run in runs.search())
    assert all(run.tested for run in (*runs.sizes(), *runs.upcycling()))


def test_runs_compared_have_equal_flops():
    by_name = {run.name: run for run in runs.runs_of()}
    assert len(by_name) == len(list(runs.runs_of()))
    for one, other in (("sparse_small_0", "dense_flops_small_0"), ("upcycled_1", "continued_1")):
        flops = [runs.forward_flops(by_name[name]) * by_name[name].updates for name in (one, other)]
        assert flops[0] == pytest.approx(flops[1], rel=2e-3)


def test_the_sparse_model_of_the_middle_size_is_the_recipe():
    (run,) = (run for run in runs.sizes() if run.name == "sparse_middle_0")
    config, recipe = run.config(Path("runs")), runs.RECIPE
    assert config.model == recipe.model
    assert config.optim == recipe.optim
    assert config.schedule == recipe.schedule
    assert {**config.data.__dict__, "root": recipe.data.root} == recipe.data.__dict__


def test_information_of_independent_experts_is_its_chance_level():
    bound = np.repeat(100 * np.eye(4, dtype=int), 2, axis=0)
    found = specialisation.information(bound)
    assert found["bits"] == pytest.approx(2.0) == found["most"]
    assert found["chance"] < 0.05
    assert specialisation.information(np.full((8, 4), 25))["bits"] == pytest.approx(0.0)


def test_equal_inference_flops_lie_between_settings():
    rows = [(10.0, 0.5), (20.0, 0.7), (30.0, 0.6)]
    run = {
        "forward_flops": 20.0,
        "test": {"all": 0.7},
        "settings": [{"flops": flops, "top1": top1, "batch_priority": True} for flops, top1 in rows],
        "budgets": {"0.9": {"flops": 18.0, "top1": 0.66}},
    }
    assert report.equal_flops(run, 14.0) == pytest.approx(0.58)
    # More capacity that does worse is not taken.
    assert report.equal_flops(run, 30.0) == pytest.approx(0.7)
    assert report.equal_flops(run, 5.0) is None
    assert report.reached(run, 0.68) == 20.0
    assert report.reached(run, 0.55) == 18.0
    assert report.reached(run, 0.9) is None


def test_only_seeds_that_all_have_are_compared():
    groups = [[{"seed": seed, "of": name} for seed in seeds] for name, seeds in (("a", (0, 1, 2)), ("b", (2, 0)))]
    assert [[run["of"] + str(run["seed"]) for run in runs] for runs in report.together(*groups)] == [
        ["a0", "b0"],
        ["a2", "b2"],
    ]
    assert report.together(groups[0], []) == []


def test_claims_hold_or_not():
    def run(kind: str, name: str, top1: float) -> dict:
        return {"kind": kind, "size": "small", "name": name, "seed": 0, "test": {"all": top1}}

    found = [
        run("sparse", "sparse_small_0", 0.5),
        run("dense", "dense_small_0", 0.45),
        run("dense", "dense_flops_small_0", 0.51),
    ]
    lines = claims.table(found)
    assert [line.split(" | ")[2:] for line in lines[4:-1]] == [
        ["small +5.0 points", "yes |"],
        ["small -1.0 points", "no |"],
    ]
    assert claims.table([]) == []


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_says_what_the_results_hold(name):
    file = RESULTS / "typefaces" / "results.json"
    content = json.loads(file.read_text()) if file.exists() else None
    text = (FIGURES.parent / name).read_text(encoding="utf-8")
    assert pages.inserted(text, pages.PAGES[name](content)) == text


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="page must have the lines"):
        pages.inserted("# Another", ["a"])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of few letters and updates; returns the folder of its runs."""
    faces = {"train": ("DejaVuSans", "DejaVuSerif"), "val": ("DejaVuSansMono",), "test": ("STIXGeneral",)}
    for name, files in faces.items():
        (tmp_path / "fonts" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(FACES / f"{file}.ttf", tmp_path / "fonts" / name)
    (tmp_path / "fonts" / "characters.txt").write_text("ABCDEFGHIJKLMNOPQRSTUVWX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for sizes in ("SIZES", "SPARSE_SIZES"):
        monkeypatch.setattr(runs, sizes, {name: runs.Size(32, 4) for name in getattr(runs, sizes)})
    monkeypatch.setattr(runs, "SEEDS", (0,))
    monkeypatch.setattr(runs, "BATCH", 16)
    monkeypatch.setattr(runs, "WARMUP", 0)
    monkeypatch.setattr(measure, "CAPACITY_FACTORS", (1.05, 0.5))
    monkeypatch.setattr(measure, "BUDGETS", (0.9,))
    monkeypatch.setattr(measure, "CALIBRATION", 16)
    monkeypatch.setattr(measure, "scripts", lambda: {"digits": list("0123456789"), "half drawn": ["鬱", "1"]})
    return tmp_path


def test_a_whole_study(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(routers, "SECONDS", 0.01)
    assert measure.measured_speeds("sizes", tiny) is None
    found = [measure.execute(run, tiny) for run in runs.runs_of(("sizes", "upcycling"))]
    assert (tiny / "sparse_small_0" / measure.RESULT).exists()
    for name, upcycle in (("continued_0", {}), ("upcycled_0", runs.UPCYCLED)):
        config = Config.from_file(tiny / name / "config.json").model
        assert (config.checkpoint, config.upcycle) == (str(tiny / "dense_middle_0"), upcycle)
    # A finished run is read, not repeated.
    again = dataclasses.replace(next(iter(runs.sizes())), updates=9)
    assert measure.execute(again, tiny) == found[0]
    speed = {"sizes": measure.measured_speeds("sizes", tiny)}
    assert speed["sizes"].keys() == {"sparse tiny", *(f"{kind} {size}" for kind in report.KINDS for size in runs.SIZES)}
    content = {"environment": {"machine": "any"}, "runs": found, "speed": speed}
    text = "\n".join(page(content))
    assert "\n".join(pages.typefaces_lines(content)) in text.replace("Every run", "")
    for part in (
        "equal inference FLOPs",
        "dense step | sparse step",
        "digits | 1",
        "set_budget",
        "| layer | character |",
        "upcycled |",
        "after as many training steps | 5-shot",
        "is better upcycled",
    ):
        assert part in text
    assert "half drawn" not in text
    assert figures.drawn(found, tiny).keys() == {"training_flops", "capacity", "experts", "specialists"}
    assert figures.drawn(found, tmp_path / "elsewhere").keys() == {"training_flops", "capacity"}
    assert json.loads(json.dumps(found)) == found


def test_runs_wait_for_the_run_whose_weights_they_begin_with(tmp_path, capsys):
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "characters.txt").write_text("AB")
    parts = ["--parts", "upcycling", "--runs", str(tmp_path), "--out", str(tmp_path), "--figures", str(tmp_path)]
    assert main(parts) == 1
    assert "upcycled_0" in capsys.readouterr().out
