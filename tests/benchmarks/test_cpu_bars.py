"""The CPU's bars: every part is checked before it is timed, peers that are not there say how they are installed."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import cpu_bars
from benchmarks.harness.entries import Entry
from benchmarks.harness.pairs import TINY, make_models
from benchmarks.harness.protocol import Samples
from benchmarks.layer import dtypes_on_cpu, peers_on_cpu, router_on_cpu
from benchmarks.layer.on_cpu import CPU_LAYER, make_layer, tokens
from benchmarks.models import step_dtypes

SMALL = replace(CPU_LAYER, images=8, tokens_per_image=5, group_images=2, width=16, hidden=32)


@pytest.fixture
def small(monkeypatch):
    """All parts but that of the layer, which has tests of its own, at sizes that take no time."""
    monkeypatch.setattr(dtypes_on_cpu, "case_for", lambda dtype: SMALL)
    monkeypatch.setattr(router_on_cpu, "WIDTH", 16)
    monkeypatch.setattr(router_on_cpu, "IMAGES", 8)
    runs = {
        "dtypes": dtypes_on_cpu.run,
        "router": router_on_cpu.run,
        "models": partial(step_dtypes.run, pair=TINY),
        "peers": partial(peers_on_cpu.run, case=SMALL),
    }
    for name, run in runs.items():
        monkeypatch.setitem(cpu_bars.PARTS, name, (run, *cpu_bars.PARTS[name][1:]))


def test_all_parts_stand_in_one_table(small, tmp_path):
    threads = ["--threads", str(torch.get_num_threads())]
    first = cpu_bars.main(["--out", str(tmp_path), "--seconds", "0", "--parts", "peers", *threads])
    path = cpu_bars.main(["--out", str(tmp_path), "--seconds", "0", "--parts", "router", "dtypes", "models", *threads])
    assert path == first
    content, text = json.loads(path.with_suffix(".json").read_text()), path.read_text()
    assert set(content["parts"]) == {"dtypes", "router", "models", "peers"}
    assert text == "\n".join(cpu_bars.markdown(content)) + "\n"
    for part in content["parts"].values():
        assert part["bars"]
        assert part["rows"]
        assert set(part["environment"]) >= {"machine", "torch", "threads", "commit", "command"}
        for bar in part["bars"]:
            assert Entry(**bar).line() in text
            assert (bar["measured"] is None) == bool("installed" in bar["note"] or "left out" in bar["note"])
    limits = [bar["limit"] for bar in content["parts"]["dtypes"]["bars"] if bar["limit"] is not None]
    assert limits == [1.15] * 6
    # The order of the table is that of the parts, whatever was measured first.
    assert text.index("**the router**") < text.index("**the whole model**") < text.index("**peers**")


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (Entry("a", 1.15, 1.2, 1.1, 1.3), "| a | 1.15 | 1.200 (1.100..1.300) | missed |"),
        (Entry("a", 1.15, 1.15, 1.15, 1.15, "small"), "| a | 1.15 | 1.150 | passed; small |"),
        (Entry("a", None, 2.0, 1.0, 3.0, "other"), "| a |  | 2.000 (1.000..3.000) | other |"),
        (Entry("a", 1.0, note="not installed: pip"), "| a | 1.00 | not measured | not installed: pip |"),
    ],
)
def test_lines_say_passed_missed_or_why_not(entry, line):
    assert entry.line() == line


def test_entries_of_a_type_compare_runs_of_the_same_round():
    fast, slow = Samples((1.0, 10.0, 2.0)), Samples((2.0, 20.0, 4.0))
    samples = {
        "bare GEMMs, float32/forward": slow,
        "bare GEMMs, float32/both": slow,
        "bare GEMMs, bfloat16/forward": fast,
        "bare GEMMs, bfloat16/both": fast,
        "MoeMlp, bfloat16, eval/forward": fast,
        "MoeMlp, bfloat16, train/forward": slow,
        "MoeMlp, bfloat16, train/both": slow,
    }
    found = dtypes_on_cpu.entries(torch.bfloat16, samples)
    assert [entry.measured for entry in found] == [1.0, 2.0, 2.0, 0.5, 1.0, 0.5, 1.0]
    assert [entry.verdict for entry in found] == ["passed", "missed", "missed", "", "", "", ""]


def test_no_type_is_timed_that_is_wrong(monkeypatch):
    def wrong(case, impl="auto"):
        layer = make_layer(case, impl)
        if impl == "auto":
            layer.fc2.bias.data[0, 0] += 1.0
        return layer

    x = tokens(SMALL).detach().bfloat16().requires_grad_()
    dtypes_on_cpu.check(SMALL, torch.bfloat16, x, torch.randn(x.shape).bfloat16())
    monkeypatch.setattr(dtypes_on_cpu, "make_layer", wrong)
    with pytest.raises(RuntimeError, match=r"out must be within .* of float64"):
        dtypes_on_cpu.check(SMALL, torch.bfloat16, x, torch.randn(x.shape).bfloat16())


def test_no_router_is_timed_that_is_wrong():
    model = router_on_cpu.make_model(16)
    alone = router_on_cpu.routers_alone(model, torch.randn(8, 1, 28, 28))
    router_on_cpu.check(model, alone)
    layer = model.blocks[1].mlp
    layer.router.weight.register_hook(lambda gradient: gradient * (1.01 if layer.impl == "auto" else 1.0))
    with pytest.raises(RuntimeError, match=r"blocks.1.mlp.d_weight must be within 1e-5 of the eager reference"):
        router_on_cpu.check(model, alone)


def test_no_model_is_timed_in_bfloat16_that_is_wrong():
    models, images = make_models(TINY, torch.device("cpu"), torch.float32)
    for name, model in step_dtypes.variants(models["ours"].eval()).items():
        step_dtypes.check(name, model, images)
        model.blocks[1].mlp.register_forward_hook(lambda layer, x, y: y * 1.5 if layer.impl == "auto" else y)
        with pytest.raises(RuntimeError, match=f"{name}: logits must be within"):
            step_dtypes.check(name, model, images)


class Theirs(nn.Module):
    """A package's layer: ours, with a factor on its output."""

    def __init__(self, layer: nn.Module, factor: float):
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x):
        y = self.layer(x) * self.factor
        return y, y.new_zeros((), requires_grad=True)


def package(factor: float) -> peers_on_cpu.Package:
    return peers_on_cpu.Package("json", "pip install it", lambda case, layer: Theirs(layer, factor), "more work")


def test_packages_are_checked_against_ours(monkeypatch):
    absent = peers_on_cpu.Package("no_such_package", "pip install it", None, "")
    packages = {"right": package(1.0), "wrong": package(1.01), "absent": absent}
    monkeypatch.setattr(peers_on_cpu, "PACKAGES", packages)
    found, rows = peers_on_cpu.run(0.0, SMALL)
    lines = {entry.what: entry for entry in found}
    assert {row.variant for row in rows} == {"MoeMlp", peers_on_cpu.ONE_HOT, peers_on_cpu.GROUPED, "right"}
    right, wrong, missing = (lines[f"forward, float32: {name} over MoeMlp"] for name in packages)
    assert right.measured > 0
    assert (right.note, right.limit) == ("more work", None)
    assert wrong.measured is None
    assert "left out: out must be within 1e-4 of ours where nothing is dropped, got 1.0e-02" in wrong.note
    assert missing.note == "not installed: pip install it"


def test_a_formulation_that_is_wrong_is_left_out(monkeypatch):
    experts = peers_on_cpu.expert_variants

    def wrong(case, compiler):
        return {"grouped_mm": lambda x, **weights: experts(case, compiler)["grouped_mm"](x, **weights) * 1.01}

    monkeypatch.setattr(peers_on_cpu, "expert_variants", wrong)
    samples, reasons = peers_on_cpu.time_dtype(SMALL, torch.float32, 0.0)
    assert f"{peers_on_cpu.GROUPED}/both" not in samples
    assert reasons[peers_on_cpu.GROUPED].startswith("left out: out must be within")
