"""The study of typefaces: its splits, its arithmetic, and a whole run of it in a minute on matplotlib's fonts."""

import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from benchmarks.harness.results import RESULTS
from benchmarks.studies.fashion_mnist import FIGURES
from benchmarks.studies.typefaces import (
    claims,
    earlier,
    figures,
    fonts,
    measure,
    pages,
    report,
    routers,
    runs,
    specialisation,
)
from benchmarks.studies.typefaces.__main__ import main, page, work_through
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
    tried = [run.name for run in runs.search() if run.kind == "upcycled"]
    assert len(tried) > 1
    pairs = [("sparse_small_0", "dense_flops_small_0"), ("upcycled_1", "continued_1")]
    pairs += [(f"sparse_twice_middle_{seed}", f"dense_twice_middle_{seed}") for seed in runs.SEEDS[:2]]
    for one, other in [*pairs, *((name, "continued_0") for name in tried)]:
        flops = [runs.forward_flops(by_name[name]) * by_name[name].updates for name in (one, other)]
        assert flops[0] == pytest.approx(flops[1], rel=2e-3)


def test_a_result_says_what_measured_it():
    run = next(iter(runs.sizes()))
    own = measure.told(run)
    assert own["name"] == run.name
    assert set(own["measured"]) == {"day", "commit", "torch", "machine"}
    assert own["measured"]["torch"] == torch.__version__


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
    assert [line.split(" | ")[2:] for line in lines[4:-5]] == [
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
    for module in (runs, measure):
        monkeypatch.setattr(module, "SEEDS", (0,))
    monkeypatch.setattr(runs, "BATCH", 16)
    monkeypatch.setattr(runs, "WARMUP", 0)
    monkeypatch.setattr(runs, "ADDED", 2)
    monkeypatch.setattr(runs, "TWICE", 6)
    monkeypatch.setattr(measure, "CAPACITY_FACTORS", (1.05, 0.5))
    monkeypatch.setattr(measure, "BUDGETS", (0.9,))
    monkeypatch.setattr(measure, "CALIBRATION", 16)
    monkeypatch.setattr(measure, "scripts", lambda: {"digits": list("0123456789"), "half drawn": ["鬱", "1"]})
    return tmp_path


def test_a_whole_study(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(routers, "SECONDS", 0.01)
    found = [measure.execute(run, tiny) for run in runs.runs_of(("sizes", "upcycling"))]
    assert (tiny / "sparse_small_0" / measure.RESULT).exists()
    for name, upcycle in (("continued_0", {}), ("upcycled_0", json.loads(json.dumps(runs.SPARSE)))):
        config = Config.from_file(tiny / name / "config.json").model
        assert (config.checkpoint, config.upcycle) == (str(tiny / "dense_middle_0"), upcycle)
    # A finished run is read, not repeated.
    again = dataclasses.replace(next(iter(runs.sizes())), updates=9)
    assert measure.execute(again, tiny) == found[0]
    speed = {"sizes": measure.measured_speeds("sizes", tiny)}
    assert measure.known_speeds("sizes", speed["sizes"]) == speed["sizes"]
    another = {**speed["sizes"], "dense small": {**speed["sizes"]["dense small"], "fingerprint": "of other settings"}}
    assert measure.known_speeds("sizes", another) == measure.known_speeds("sizes", {}) == {}
    assert speed["sizes"].keys() == {
        *(f"dense {size}" for size in runs.SIZES),
        *(f"sparse {size}" for size in runs.SPARSE_SIZES),
    }
    content = {"environment": {"machine": "any"}, "runs": found, "speed": speed}
    text = "\n".join(page(content))
    assert "\n".join(pages.typefaces_lines(content)) in text.replace("Every run", "")
    for part in (
        "equal inference FLOPs",
        "dense step | sparse step",
        "digits | 1",
        "| small | 0.9 | ",
        "| middle, twice as long | ",
        " | - | - | ",
        "| layer | character |",
        "upcycled |",
        "after as many training steps | 5-shot",
        "is better upcycled",
    ):
        assert part in text
    assert "half drawn" not in text
    # What the sizes share with the comparison of routers is no comparison yet.
    assert "Routers and layouts" not in text
    assert figures.drawn(found, tiny).keys() == {"training_flops", "capacity", "experts", "specialists"}
    assert figures.drawn(found, tmp_path / "elsewhere").keys() == {"training_flops", "capacity"}
    assert json.loads(json.dumps(found)) == found


def test_runs_wait_for_the_run_whose_weights_they_begin_with(tmp_path, capsys):
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "characters.txt").write_text("AB")
    parts = ["--parts", "upcycling", "--runs", str(tmp_path), "--out", str(tmp_path), "--figures", str(tmp_path)]
    assert main([*parts, "--minutes", "0"]) == 1
    said = capsys.readouterr().out
    assert "dense_middle_0" in said
    assert "upcycled_0" in said
    waiting = [next(run for run in runs.upcycling() if run.name == "upcycled_0")]
    assert work_through(waiting, tmp_path, jobs=1, deadline=float("inf")) == []


def test_published_runs_are_not_repeated(tmp_path):
    every = list(runs.runs_of())
    by_name = {run.name: run for run in every}
    names = ("dense_middle_0", "dense_middle_1", "sparse_middle_0")
    told = [{**measure.told(by_name[name]), "top1": 0.5} for name in names]
    told[1]["fingerprint"] = "of other settings"
    (tmp_path / "results.json").write_text(json.dumps({"runs": told}))
    assert earlier.restore(earlier.published(tmp_path / "elsewhere.json"), every, tmp_path) == []
    assert earlier.restore(earlier.published(tmp_path / "results.json"), every, tmp_path) == [
        "sparse_middle_0",
        "dense_middle_0",
    ]
    assert earlier.found(by_name["dense_middle_0"], tmp_path)["top1"] == 0.5
    assert earlier.found(by_name["dense_middle_1"], tmp_path) is None
    # Not here are its weights, which another begins with.
    asked = [by_name[name] for name in ("dense_middle_0", "sparse_middle_0", "continued_0")]
    assert [run.name for run in earlier.needed(asked, tmp_path)] == ["dense_middle_0", "continued_0"]
    # What is found here stands for it.
    earlier.write_result(tmp_path / "dense_middle_0" / earlier.RESULT, {**told[0], "top1": 0.6})
    assert earlier.found(by_name["dense_middle_0"], tmp_path)["top1"] == 0.6
    assert [run.name for run in earlier.needed(asked, tmp_path)] == ["continued_0"]
    # Settings that changed since make it unknown again.
    changed = {"runs": told[1:2]}
    earlier.restore(changed, every, tmp_path)
    assert earlier.found(by_name["sparse_middle_0"], tmp_path) is None
    earlier.write_result(tmp_path / "dense_middle_1" / earlier.RESULT, told[1])
    with pytest.raises(ValueError, match=r"dense_middle_1/result\.json must be of the settings of now"):
        earlier.restore(changed, every, tmp_path)


def test_a_fingerprint_tells_what_decides_a_result():
    (run,) = (run for run in runs.sizes() if run.name == "sparse_middle_0")
    others = {"seed": 1, "updates": 9, "changes": ("optim.lr=1",), "model": (("num_experts", 16),), "after": run}
    changed = [dataclasses.replace(run, **{name: value}) for name, value in others.items() if name != "model"]
    changed.append(dataclasses.replace(run, model=(("capacity_factor", 2.0),)))
    assert len({run.fingerprint(), *(each.fingerprint() for each in changed)}) == 1 + len(others)
    assert dataclasses.replace(run, name="another").fingerprint() == run.fingerprint()
    # Of what comes after a run, too.
    upcycled = runs.upcycling()[0]
    longer = dataclasses.replace(upcycled.after, updates=9)
    assert dataclasses.replace(upcycled, after=longer).fingerprint() != upcycled.fingerprint()
    dials = [runs.Run("dials", "dials", "middle", 0, 0, after=each) for each in (run, longer)]
    assert dials[0].fingerprint() != dials[1].fingerprint()


def test_seeds_that_were_asked_for_less_are_averaged_where_they_were():
    def row(selected: int, factor: float, order: bool, top1: float) -> dict:
        place = {"num_selected_experts": selected, "capacity_factor": factor, "batch_priority": order}
        return {**place, "top1": top1, "flops": 10.0 * factor}

    first = {"settings": [row(2, 0.5, True, 0.6), row(1, 0.5, True, 0.3)], "budgets": {"0.9": 1, "0.8": 2}}
    second = {"settings": [row(2, 0.5, True, 0.8)], "budgets": {"0.8": 3}}
    assert [each["top1"] for each in report.at_setting([first, second], 2, 0.5, True)] == [0.6, 0.8]
    assert [each["top1"] for each in report.at_setting([first, second], 1, 0.5, True)] == [0.3]
    assert report.at_setting([first, second], 2, 0.5, False) == []
    assert report.at_budgets([first, second]) == {"0.9": [1], "0.8": [2, 3]}
