"""The report: every benchmark runs, checks before it times, and what was written survives."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report
from benchmarks.compile import predicted
from benchmarks.harness import bars, pairs, work
from benchmarks.harness.cases import LAYERS, Case
from benchmarks.harness.pairs import TINY
from benchmarks.harness.protocol import Samples
from benchmarks.harness.results import RESULTS
from benchmarks.harness.session import Session
from benchmarks.models import scaling

CPU = torch.device("cpu")
SMALL = Case(images=4, tokens_per_image=6, group_images=2, width=16, hidden=32, num_experts=4)


def session(**options) -> Session:
    """A session on the CPU, with eager PyTorch in place of compiled opponents."""
    settings = {"cases": (SMALL,), "seconds_per_variant": 0.0, "compiler": lambda function: function, **options}
    return Session(CPU, torch.float32, **settings)


def test_every_benchmark_measures_every_variant(monkeypatch, tmp_path):
    monkeypatch.setitem(pairs.PAIRS, "cpu", TINY)
    monkeypatch.setattr(scaling, "CPU_LAYER", SMALL)
    measured = session()
    measured.run_all(report.SHARES)
    (note,) = measured.notes
    assert note.startswith("model: ")
    variants = {(row.op, row.direction): set() for row in measured.rows}
    for row in measured.rows:
        variants[row.op, row.direction].add(row.variant)
    small = {"ours", "eager", "compile"}
    for op in ("router", "dispatch", "combine"):
        assert variants[op, "forward"] == variants[op, "backward"] == small
    assert variants["slots", "forward"] == small
    opponents = small | {"bmm", "grouped_mm"}
    assert variants["expert_mlp", "both"] == variants["expert_mlp", "forward"] == opponents
    assert variants["moe_layer", "both"] == opponents | {"one-hot einsum"}
    models = {"ours", "ours, nothing dropped", "dense"}
    assert variants["model", "forward"] == variants["model", "both"] == variants["train_step", "both"] == models
    assert variants["scaling", "forward"] == {"ours"}
    assert set(measured.sweeps) == {"T", "E", "K", "C"}
    assert set(measured.ceilings) >= {"matmul", "copy", "sort", "launch"}

    path = report.write_measured(measured, tmp_path, complete=True)
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["complete"]
    assert len(content["rows"]) == len(measured.rows)
    assert {"environment", "bars", "ceilings", "notes", "peak_memory"} <= set(content)
    assert [bar["what"] for bar in content["bars"]] == [bar.what for bar in bars.BARS]
    # What needs a GPU or T = 25k stays empty.
    assert [bar["what"] for bar in content["bars"] if bar["measured"] is None] == [
        "slots (BPR), T=25k in one group",
        "peak training memory over the eager reference",
    ]


def test_compare_never_times_a_wrong_variant():
    x = torch.randn(8, 4)
    one = {"forward": work.Work(1)}
    variants = {"ours": lambda x: x * 2, "eager": lambda x: x + x, "off": lambda x: x * 2.01}
    measured = session()
    measured.compare("op", "case", variants, {"x": x}, one, None)
    assert [row.variant for row in measured.rows] == ["ours", "eager"]
    assert "off is left out: out must be within" in measured.notes[0]

    measured = session()
    measured.compare("op", "case", {**variants, "ours": variants["off"]}, {"x": x}, one, None)
    assert measured.rows == []


def test_compare_checks_gradients():
    def wrong_gradient(x):
        return x.detach() * 2 + (x - x.detach())

    measured = session()
    variants = {"ours": wrong_gradient, "eager": lambda x: x * 2}
    measured.compare("op", "case", variants, {"x": torch.randn(4)}, {"forward": work.Work(1)}, None)
    assert measured.rows == []
    assert "d_x must be within" in measured.notes[0]


def test_a_failing_benchmark_costs_the_others_nothing(monkeypatch):
    def failing(session):
        raise RuntimeError("out of memory")

    seen = []
    for name, run in (("ops.failing", failing), ("ops.following", seen.append)):
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", SimpleNamespace(run=run))
    measured = session()
    measured.run_all((("ops.failing", 0.3), ("ops.nothing", 0.3), ("ops.following", 0.4)))
    assert measured.notes == [
        "ops.failing stopped: RuntimeError: out of memory",
        "ops.nothing stopped: ModuleNotFoundError: No module named 'benchmarks.ops.nothing'",
    ]
    assert seen == [measured]


def test_kernels_are_measured_with_pytorch_and_triton_alone():
    """What benchmarks/gpu_session.sh starts, on a machine that has neither timm nor matplotlib."""
    missing = ("timm", "matplotlib", "torchvision", "PIL", "yaml", "safetensors", "msgpack", "fsspec.implementations")
    lines = [
        "import sys",
        *(f"sys.modules[{name!r}] = None" for name in missing),
        "import importlib",
        "from benchmarks import report",
        "from benchmarks.compile import predicted, sanitize, tune",
        "of_models = ('models.speed', 'models.train_step', 'models.scaling')",
        "of_kernels = [name for name, _ in report.SHARES if name not in of_models]",
        "print(len([importlib.import_module(f'benchmarks.{name}').run for name in of_kernels]))",
        "predicted.predictions()",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr


def test_an_opponent_that_does_not_compile_costs_ours_nothing():
    def broken(function):
        def call(*args, **kwargs):
            raise RuntimeError("inductor failed")

        return call

    measured = session(compiler=broken)
    measured.ceilings["copy"] = 1e9
    measured.run_all((("ops.slots", 0.5), ("layer.on_gpu", 0.5)))
    variants = {row.variant for row in measured.rows if row.op == "moe_layer"}
    # All others route by the compiled reference.
    assert variants == {"ours", "eager", "our expert MLP alone"}
    assert {row.variant for row in measured.rows if row.op == "slots"} == {"ours", "eager"}
    assert "moe_layer" in measured.notes[-1]
    assert all("is left out: inductor failed" in note for note in measured.notes)


def test_begin_says_what_no_time_was_left_for():
    measured = session(seconds=0.0)
    assert not measured.begin("router T=1")
    assert measured.notes == ["router T=1: left out, no time was left"]
    assert session().begin("router T=1")


def test_rows_are_written_as_they_come(tmp_path):
    written = session(on_row=lambda session: report.write_measured(session, tmp_path))
    written.time("op", "forward", "case", {"ours": lambda: None})
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["op"] for row in content["rows"]] == ["op"]
    assert not content["complete"]
    assert "this is a part" in (tmp_path / "report.md").read_text()


def test_predictions_are_never_called_measured(tmp_path):
    path = predicted.write_predicted(tmp_path)
    content = json.loads(path.with_suffix(".json").read_text())
    empty = [bar["measured"] is None and bar["met"] is None for bar in content["bars"]]
    assert all(empty[:-1])
    assert content["bars"][-1]["what"].endswith("(counted)")
    for part in ("predictions", "layer_kernels", "kernel_predictions"):
        assert all(each["predicted_us"] > 0 and each["measured_us"] is None for each in content[part])
    assert len(content["predictions"]) == 11 * len(LAYERS)
    assert {each["kernel"] for each in content["layer_kernels"]} == {"combine", "output_bias", "dispatch_backward"}
    names = {each["kernel"] for each in content["kernel_predictions"]}
    assert names >= {"router/noise", "slots/select/bpr/K1", "slots/sort/vanilla/K2"}
    # One prediction for a quantity: the bound where an op is bound, else its latency.
    slots = {each["predicted_us"] for each in content["predictions"] if each["op"] == "slots"}
    by_name = {each["kernel"]: each["predicted_us"] for each in content["kernel_predictions"]}
    assert slots == {by_name["slots/select/bpr/K1"], by_name["slots/select/bpr/K2"]}
    assert "nothing here was measured on a GPU" in path.read_text()


def test_committed_predictions_are_todays():
    content = json.loads((RESULTS / "predicted" / "report.json").read_text())
    assert content["predictions"] == predicted.predictions()
    assert content["layer_kernels"] == predicted.layer_kernels()
    assert content["kernel_predictions"] == predicted.latencies()


def test_predicted_layer_time_is_the_roofline():
    """T = 25,088, K = 1 without spare capacity: 0.30 ms forward at 790 TFLOP/s."""
    case = Case(num_selected=1, num_experts=8, capacity_factor=1.0)
    assert case.num_rows == case.num_tokens == 25_088
    assert work.moe_layer(case)["forward"].seconds() * 1e3 == pytest.approx(0.30, abs=0.005)
    assert work.moe_layer(case)["both"].flops == pytest.approx(3 * work.moe_layer(case)["forward"].flops)


@pytest.mark.parametrize(("ours", "met"), [(1.0, "stretch"), (1.1, "yes"), (1.3, "no")])
def test_bars_hold_the_worst_case(ours, met):
    measured = session()
    measured.samples = {
        ("moe_layer", "forward", case, variant): Samples((seconds,))
        for case, seconds_of in {"easy": (0.1, 1.3), "hard": (ours, 1.3)}.items()
        for variant, seconds in zip(("ours", "bmm"), seconds_of)
    }
    result = bars.BARS[0].result(measured)
    assert (result["case"], result["met"]) == ("hard", met)
    assert result["measured"] == pytest.approx(1.3 / ours)
    assert result["best"] == pytest.approx(13.0)
