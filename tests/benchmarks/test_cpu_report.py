"""The CPU's report: models, training steps, scaling and processes are checked before they are timed, then drawn."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import cpu_report
from benchmarks.harness import bars, pairs, protocol
from benchmarks.harness.pairs import TINY, check_compiled, check_models, make_models
from benchmarks.harness.protocol import Samples, exponent
from benchmarks.harness.session import Session
from benchmarks.layer import on_cpu
from benchmarks.layer.on_cpu import CPU_LAYER
from benchmarks.models import ranks, scaling, speed

CPU = torch.device("cpu")
SMALL = replace(CPU_LAYER, images=8, tokens_per_image=16, group_images=2, width=64, hidden=32)


def session(**options) -> Session:
    """A session that runs everything as seldom as it may, eager models in place of compiled ones."""
    return Session(CPU, torch.float32, seconds_per_variant=0.0, compiler=lambda model: model.forward, **options)


def test_the_report_has_every_number_and_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(pairs.PAIRS, "cpu", TINY)
    for benchmark in (on_cpu, scaling, ranks):
        monkeypatch.setattr(benchmark, "CPU_LAYER", SMALL)
    monkeypatch.setattr(ranks, "RANKS", (2,))
    monkeypatch.setattr(ranks, "ROUNDS", 2)
    monkeypatch.setattr(cpu_report, "LAYER_SHARE", 0.0)
    monkeypatch.setattr(cpu_report, "Session", lambda *_, on_row, **__: session(on_row=on_row))
    assert cpu_report.run(tmp_path, 600.0) == 0
    (folder,) = tmp_path.iterdir()
    content = json.loads((folder / "report.json").read_text())
    assert content["complete"]
    assert all(bar["measured"] is not None for bar in [*content["bars"], *content["layer_bars"]])
    assert {row["op"] for row in content["rows"]} == {"model", "train_step", "scaling", "ranks"}
    assert set(content["exponents"]) == {"T", "E", "K", "C"}
    assert [note.split(":")[0] for note in content["notes"]] == ["model"]
    text = (folder / "report.md").read_text()
    for name in ("models", "layer", "scaling"):
        assert f"![{name}]({name}.png)" in text
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_no_model_is_timed_that_is_wrong(monkeypatch):
    def wrong(pair, device, dtype):
        models, x = make_models(pair, device, dtype)
        models["ours"].blocks[1].mlp.register_forward_hook(lambda layer, x, y: y * 1.01 if layer.impl == "auto" else y)
        return models, x

    monkeypatch.setitem(pairs.PAIRS, "cpu", TINY)
    monkeypatch.setattr(speed, "make_models", wrong)
    measured = session()
    measured.run_all((("models.speed", 1.0),))
    assert measured.rows == []
    assert "ours: out must be within" in measured.notes[0]


def test_models_are_checked_gradient_by_gradient():
    models, x = make_models(TINY, CPU, torch.float32)
    check_models(models, x)
    layer = models["ours"].blocks[1].mlp
    layer.fc2.bias.register_hook(lambda gradient: gradient * (1.01 if layer.impl == "auto" else 1.0))
    with pytest.raises(RuntimeError, match=r"ours: d_blocks.\*.mlp.fc2.bias must be within"):
        check_models(models, x)


def test_a_compiled_model_must_agree_with_the_eager_one():
    models, x = make_models(TINY, CPU, torch.float32)
    dense = models["dense"].eval()
    check_compiled(dense.forward, dense, x)
    with pytest.raises(RuntimeError, match="logits must be within"):
        check_compiled(lambda x: dense(x) * 1.001, dense, x)


def test_even_loads_fill_every_slot():
    """Only so is E varied at equal rows."""
    sweep = next(each for each in scaling.sweeps(SMALL) if each.even)
    for experts, case in sweep.cases.items():
        layer, x = scaling.layer_of(case, session(), even=True)
        with torch.no_grad():
            layer(x)
        assert (layer.record.slots >= 0).all()
        assert layer.record.experts.view(-1).bincount().tolist() == [x.shape[0] * x.shape[1] / experts] * experts


def test_sweeps_time_nothing_that_is_wrong(monkeypatch):
    monkeypatch.setitem(scaling.TOLERANCES, torch.float32, -1.0)
    measured = session()
    with pytest.raises(RuntimeError, match="T=32: output must be within"):
        scaling.run(measured, SMALL)
    assert measured.rows == []


def test_exponent_and_change_of_a_known_sweep():
    quadratic = {2.0**power: Samples((4.0**power, 3 * 4.0**power)) for power in range(4)}
    assert exponent(quadratic).seconds == pytest.approx((2.0, 2.0))
    assert protocol.change(quadratic).seconds == pytest.approx((64.0, 64.0))
    measured = session()
    measured.sweeps = {"T": quadratic, "E": {8: Samples((1.0, 2.0)), 64: Samples((1.1, 2.2))}}
    growth, change = (bar.result(measured) for bar in bars.CPU_BARS[1:])
    assert (growth["met"], change["met"]) == ("no", "yes")
    assert change["measured"] == pytest.approx(10.0)
