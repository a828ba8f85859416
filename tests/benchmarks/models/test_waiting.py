"""The benchmark of waiting: each variant has its environment, and both files say what was measured."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.models import waiting
from benchmarks.models.waiting import BUSY, QUIET, VARIANTS, busy_cores, main, measured


def test_main_writes_both_files(tmp_path, monkeypatch, capsys):
    seen = []

    def run(command, env, **options):
        seen.append({name: value for name, value in env.items() if name.startswith(("OMP", "GOMP", "KMP", "MKL"))})
        return SimpleNamespace(stdout="a line of the run\n[0.25, 0.5]\n")

    monkeypatch.setenv("KMP_BLOCKTIME", "9")
    monkeypatch.setattr(waiting, "available_cores", lambda: 2)
    monkeypatch.setattr(waiting, "busy_cores", lambda count: busy_cores(0))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(waiting, "environment", lambda device: {"machine": "test"})
    path = main(["--rounds", "1", "--updates", "2", "--out", str(tmp_path)])
    assert seen == 2 * [{"OMP_NUM_THREADS": "2", **extra} for extra in VARIANTS.values()]
    assert path.read_text(encoding="utf-8").strip() == capsys.readouterr().out.strip()
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [(row["case"].partition(",")[0], row["variant"]) for row in rows] == [
        (state, variant) for state in (QUIET, BUSY) for variant in VARIANTS
    ]
    assert {row["median_us"] for row in rows} == {375_000.0}


def test_variant_that_does_not_end_counts_as_its_time(monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert measured("default", 5, 7.0) == (7.0,)


def test_busy_processes_end_with_the_block():
    with pytest.raises(ValueError, match="stop"), busy_cores(1):
        raise ValueError("stop")
