"""Committed results: every Markdown file says what its JSON holds and no more, and nothing else lies there."""

import importlib
import json

import pytest

from benchmarks.harness.results import RESULTS

# What writes each pair of files, by the file's name or its folder; on a GPU, report.py writes `report`.
WRITERS = {
    "cpu_bars": "cpu_bars",
    "gemms": "compile.gemms",
    "layer_on_cpu": "layer.on_cpu",
    "layer_step": "compile.layer_step",
    "models_checkpoint_read": "models.checkpoint_read",
    "models_int8_experts": "models.int8_experts",
    "models_train_loop": "models.train_loop",
    "models_waiting": "models.waiting",
    "models_video_loader": "models.video_loader",
    "motion": "studies.motion.report",
    "report": "cpu_report",
    "upcycle": "studies.upcycle",
}
# Their own tests hold those of the studies that have a `*_report.py`, and of the compile report and predictions.
ELSEWHERE = {"compile_report", "predicted", "budget", "results"}
FILES = sorted(path for path in RESULTS.rglob("*.json") if not {path.parent.name, path.stem} & ELSEWHERE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_markdown_says_what_the_json_holds(path):
    markdown = importlib.import_module(f"benchmarks.{WRITERS[path.stem]}").markdown
    assert path.with_suffix(".md").read_text() == "\n".join(markdown(json.loads(path.read_text()))) + "\n"


def test_nothing_else_lies_there():
    for path in RESULTS.rglob("*.*"):
        if path.suffix == ".md" and path != RESULTS / "README.md":
            assert path.with_suffix(".json").exists(), path
        elif path.suffix == ".png":
            assert path.name in json.loads((path.parent / "report.json").read_text())["pictures"], path
        else:
            assert path.suffix in (".json", ".csv") or path == RESULTS / "README.md", path
