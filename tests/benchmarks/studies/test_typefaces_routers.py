"""The study's comparison of routers: what it trains, its arithmetic, and a whole run of it on matplotlib's fonts."""

import json

import pytest

from benchmarks.studies.typefaces import measure, pages, router_figures, router_report, routers, runs
from benchmarks.studies.typefaces.__main__ import main, page
from tests.benchmarks.studies.test_typefaces import tiny  # noqa: F401  a fixture

NAMES = [label for label, _ in runs.comparison()]


def test_every_router_and_layout_gets_the_same_training_flops():
    found = runs.comparison()
    labels = set(routers.models())
    assert {label for label, _ in found} == labels >= {"dense", "soft", *routers.DIALLED}
    assert len(found) == 2 * len(labels) == len({run.name for _, run in found})
    work = {runs.forward_flops(each) * each.updates for _, each in found}
    assert max(work) / min(work) < 1.001
    assert all(run.size == "middle" and run.tested for _, run in found)


def test_what_another_part_trains_is_not_trained_twice():
    known = {run.name for run in runs.sizes()}
    shared = {run.name for _, run in runs.comparison()} & known
    assert shared == {f"{kind}_twice_middle_{seed}" for kind in ("dense", "sparse") for seed in (0, 1)}
    together = [run.name for run in runs.runs_of(("sizes", "routers"))]
    assert len(together) == len(set(together)) < len(known) + len(list(runs.runs_of(("routers",))))
    # Whatever the sparse model of the study is.
    one = dict(runs.comparison())["top experts, K=1"]
    arguments = {**runs.SPARSE, **dict(one.model)}
    assert arguments["num_selected_experts"] == 1
    assert not arguments.get("renormalize_gates")


def test_layouts_of_several_sizes_are_what_they_are_called():
    made, experts = routers.models(), routers.NUM_EXPERTS
    widths = made["several sizes, equal parameters"][1]["expert_hidden"]
    assert len(widths) == experts == sum(widths)
    other = made["several sizes, equal active FLOPs"][1]
    assert len(other["expert_hidden"]) == experts == sum(other["expert_hidden"]) * other["num_selected_experts"]


def test_experts_per_token_lie_between_settings():
    rows = [(2.0, 0.5, 0.7), (1.0, 0.0, 0.6), (0.5, 0.0, 0.2)]
    run = {"dials": [{"dial": "K", "selected_experts": s, "dropped": d, "top1": t} for s, d, t in rows]}
    other = {"dials": [{**row, "top1": row["top1"] + 0.1} for row in run["dials"]]}
    line = router_report.points([run, other], "K")
    assert [value for point in line for value in point] == pytest.approx([0.5, 0.25, 1.0, 0.65, 1.0, 0.75])
    assert router_report.at(line, 0.75) == pytest.approx(0.45)
    assert router_report.at(line, 0.25) is None
    assert router_report.at(line, 1.5) is None


def test_differences_below_the_seeds_say_nothing():
    found = {
        "a": [{"test": {"all": 0.5}}, {"test": {"all": 0.52}}],
        "b": [{"test": {"all": 0.6}}, {"test": {"all": 0.61}}],
    }
    assert router_report.verdict(found) == (
        "Best: b, 60.50 %; a, 51.00 %. Seeds of one model are up to 2.00 points apart: smaller differences say nothing."
    )
    assert "one seed" in router_report.verdict({label: each[:1] for label, each in found.items()})


def test_a_whole_comparison(tiny, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(measure, "MEANS", (2.0, 1.0, 0.5))
    monkeypatch.setattr(routers, "SECONDS", 0.01)
    # In this process, where the study is tiny.
    everything = list(runs.runs_of(("routers",)))
    for run in everything:
        assert measure.execute(run, tiny)["name"] == run.name
    (tiny / "docs").mkdir()
    for name in pages.PAGES:
        (tiny / "docs" / name).write_text(f"# Which\n\n{pages.BEGIN}\n\nbefore\n\n{pages.END}\n\nmore\n")
    told = tiny / "docs" / "routers.md"
    options = {"out": tiny / "out", "figures": tiny, "runs": tiny, "pages": tiny / "docs"}
    words = ["--parts", "routers", *(word for name, path in options.items() for word in (f"--{name}", str(path)))]
    assert main(["--speed", *words]) == 0
    content = json.loads((tiny / "out" / "results.json").read_text())
    assert (tiny / "out" / "results.md").read_text() == "\n".join(page(content)) + "\n" == capsys.readouterr().out
    for label in dict.fromkeys(NAMES):
        assert f"\n| {label} | " in told.read_text()
        assert content["speed"]["routers"][label]["step"][0] > content["speed"]["routers"][label]["inference"][0] > 0
    assert "before" not in told.read_text()
    assert told.read_text().endswith("\n\nmore\n")
    assert {"typefaces_routers.png", "typefaces_dials.png"} <= {path.name for path in tiny.glob("*.png")}
    by_name = {run["name"]: run for run in content["runs"]}
    for label, run in runs.comparison():
        row = router_report.evaluation(by_name[run.name])
        assert (row is None) == (label == "dense")
        assert router_report.filled(by_name[run.name]) <= by_name[run.name]["forward_flops"] * 1.01
    dials = by_name[f"dials_{dict(runs.comparison())['top experts, K=2'].name}"]["dials"]
    assert [row["dial"] for row in dials] == ["K"] * 2 + ["capacity"] * 2 + ["threshold"] * 3
    by_mean = [row["selected_experts"] for row in dials[-3:]]
    assert by_mean == pytest.approx([2.0, 1.0, 0.5], abs=0.25)
    # Asked for once: what was published stays.
    assert main(words) == 0
    assert json.loads((tiny / "out" / "results.json").read_text())["speed"] == content["speed"]
    assert router_figures.drawn({"runs": []}) == {}
