"""The CPU benchmark: it refuses wrong results, weighs the layer's memory, and writes what it says it writes."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.harness.protocol import Samples
from benchmarks.layer import on_cpu
from benchmarks.layer.on_cpu import CPU_LAYER, make_layer, memory_bars, run_cpu, speed_bars, tokens

SMALL = replace(CPU_LAYER, images=8, tokens_per_image=5, width=16, hidden=32)


def test_run_cpu_measures_every_variant_and_bar():
    content = run_cpu(SMALL, 0.01)
    text = "\n".join(on_cpu.markdown(content))
    assert json.loads(json.dumps(content)) == content
    assert {row["variant"] for row in content["rows"]} >= {
        "MoeMlp, train",
        "MoeMlp, eval",
        "bare GEMMs",
        "dense Mlp, eval",
    }
    assert {row["direction"] for row in content["rows"]} == {"forward", "both"}
    assert all(row["median_us"] > 0 and row["low_us"] <= row["median_us"] <= row["high_us"] for row in content["rows"])
    assert len(content["bars"]) == 8
    assert all(bar["what"] in text for bar in content["bars"])
    assert set(content["environment"]) >= {"machine", "torch", "commit", "command", "threads"}


def test_run_cpu_times_nothing_that_is_wrong(monkeypatch):
    def wrong(case, impl="auto"):
        layer = make_layer(case, impl)
        if impl == "auto":
            layer.fc1.bias.data[0, 0] += 1.0
        return layer

    monkeypatch.setattr(on_cpu, "make_layer", wrong)
    with pytest.raises(RuntimeError, match=r"out must be within 1e-5 of the eager reference, got .*: nothing is timed"):
        run_cpu(SMALL, 0.01)


def test_layer_memory_stays_within_its_saved_tensors_and_gradients():
    case = replace(CPU_LAYER, images=32)
    x = tokens(case)
    for bar in memory_bars(case, x, torch.randn(x.shape)):
        assert 0.5 < bar.measured <= bar.limit, bar.what


def test_speed_bars_compare_runs_of_the_same_round():
    fast, slow = Samples((1.0, 10.0, 2.0)), Samples((2.0, 20.0, 4.0))
    samples = {
        "MoeMlp, eval/forward": slow,
        "MoeMlp, train/forward": fast,
        "MoeMlp, train/both": slow,
        "bare GEMMs/forward": fast,
        "bare GEMMs/both": fast,
        "dense Mlp, eval/forward": slow,
        "dense Mlp, train/both": slow,
    }
    assert [bar.measured for bar in speed_bars(samples)] == pytest.approx([2.0, 1.0, 2.0, 1.0, 1.0])
    assert "| no |" in speed_bars(samples)[0].line()
    assert "| yes |" in speed_bars(samples)[1].line()
