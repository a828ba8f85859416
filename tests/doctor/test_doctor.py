"""vmoe doctor: what it says of this machine, of an op that is broken, and of devices that are not here."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import vmoe_kernels as kernels
from tests.test_cli import fails
from vmoe_kernels.common.impl import Choice
from vmoe_torch.cli import main
from vmoe_torch.doctor import examination, machine, ops, speed
from vmoe_torch.doctor.examination import Examination, examine, judge_choice
from vmoe_torch.doctor.machine import device_or_reason
from vmoe_torch.doctor.ops import DTYPES, ODD, OPS, Sizes
from vmoe_torch.doctor.problems import Problem
from vmoe_torch.doctor.text import describe

CPU = torch.device("cpu")
TINY = Sizes(16, 2, 4, 8, 8, 16)
# A change that must be seen: of an output's largest element, or of a gradient.
VISIBLE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01, "float64": 1e-12}
GPU = {"device": "cuda:0", "name": "NVIDIA L4", "capability": "8.9", "multiprocessors": 58, "memory": 24 * 2**30}


@pytest.fixture
def quick(monkeypatch):
    """Small sizes, and no process groups."""
    monkeypatch.setitem(ops.SIZES, "cpu", (ODD,))
    monkeypatch.setitem(speed.SIZES, "cpu", TINY)
    monkeypatch.setattr(machine, "groups", lambda device: ({"gloo": "not tried"}, []))


def broken(op, dtype, change, monkeypatch):
    """Changes what an op of vmoe_kernels gives for tokens of a dtype."""
    whole = getattr(kernels, op)

    def changed(first, *args, **kwargs):
        out = whole(first, *args, **kwargs)
        return change(out) if first.dtype == DTYPES[dtype] else out

    monkeypatch.setattr(kernels, op, changed)


def examined(device="cpu", **fields):
    """An examination that has ended, of which nothing but these fields is known."""
    return Examination(device, complete=True, versions={"vmoe-torch": "0"}, threads=machine.threads(), **fields)


def lines_of(text, heading):
    """The lines below a heading."""
    return text.split(f"\n\n{heading}", 1)[1].split("\n\n", 1)[0].splitlines()[1:]


def test_all_is_well_on_this_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(speed.SIZES, "cpu", TINY)
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--device=cpu", "--seconds=1", f"--json={file}"]) == 0
    out = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in out
    assert "gloo  a group of one process works" in out
    assert "float32, bfloat16, float16, float64  our loops for a CPU: the tensors are on a CPU" in out
    assert (
        out.rstrip().splitlines()[-3].startswith(f"All is well: {len(OPS) * len(DTYPES)} checks of {len(OPS)} ops in")
    )
    found = json.loads(file.read_text())
    assert found["healthy"]
    assert found["complete"]
    assert found["problems"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["auto"]["float32"] == {"impl": "cpu", "reason": "the tensors are on a CPU"}
    assert {(check["op"], check["dtype"]) for check in found["checks"]} == {
        (op, dtype) for op in OPS for dtype in DTYPES
    }
    for check in found["checks"]:
        assert check["status"] == "ok"
        assert len(check["results"]) == 2
        for results in check["results"].values():
            assert results
            assert all(0 <= one["error"] <= one["allowed"] for one in results.values())
    moe = next(check for check in found["checks"] if check["op"] == "moe_mlp")
    assert {"output", "d_x", "d_gates", "d_fc1_weight", "d_fc2_bias"} <= next(iter(moe["results"].values())).keys()
    assert [(one["dtype"], one["direction"]) for one in found["speeds"]] == [
        (dtype, direction)
        for dtype in ("float32", "bfloat16", "float16")
        for direction in ("forward", "forward and backward")
    ]
    assert all(one[name] > 0 for one in found["speeds"] for name in ("ours", "eager", "products", "flops", "rounds"))


def test_every_op_with_a_twin_is_checked():
    twins = {name.removesuffix("_reference") for name in kernels.__all__ if name.endswith("_reference")}
    # route is router and assign_slots.
    assert twins - {"route"} == OPS.keys()


def test_an_op_that_is_wrong_in_one_dtype_is_named(quick, monkeypatch, tmp_path, capsys):
    broken("combine", "bfloat16", lambda y: y * 1.05, monkeypatch)
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--device=cpu", "--seconds=0", f"--json={file}"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    rows = {line.split()[0]: line.split()[1:] for line in lines_of(out, "Ops on cpu")[1 : 1 + len(OPS)]}
    assert [name for name, cells in rows.items() if "FAILS" in cells] == ["combine"]
    assert [cell == "FAILS" for cell in rows["combine"]] == [False, True, False, False]
    assert "1 problem:\n1. combine in bfloat16: output is off by " in out
    assert 'what to do: set impl="reference"' in out
    found = json.loads(file.read_text())
    assert not found["healthy"]
    assert [(one["op"], one["dtype"]) for one in found["checks"] if one["status"] == "fails"] == [
        ("combine", "bfloat16")
    ]
    assert found["problems"][0]["what"] == "combine in bfloat16"
    assert "eager PyTorch is off by" in found["problems"][0]["why"]


def test_an_op_that_raises_is_named_and_its_traceback_is_in_the_json(quick, monkeypatch, tmp_path, capsys):
    def refuses(out):
        raise RuntimeError("no kernel image\nis available")

    broken("moe_mlp", "float16", refuses, monkeypatch)
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--device=cpu", "--seconds=1", f"--json={file}"]) == 1
    out, err = capsys.readouterr()
    assert "1. moe_mlp in float16: RuntimeError: no kernel image is available" in out
    assert "Traceback" not in out + err
    found = json.loads(file.read_text())
    assert "in refuses" in found["problems"][0]["traceback"]
    assert sum(one["status"] == "ok" for one in found["checks"]) == len(OPS) * len(DTYPES) - 1
    # What is wrong has no speed.
    assert {one["dtype"] for one in found["speeds"]} == {"float32", "bfloat16"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", sorted(OPS.keys() - {"assign_slots", "assign_dropless_slots"}))
def test_no_budget_is_empty(op, dtype, monkeypatch):
    """A small error in one element of an output is seen, and one in a gradient whose value is right."""
    whole = getattr(kernels, op)

    def an_element(y):
        change = torch.zeros_like(y).flatten()
        change[y.detach().abs().argmax()] = VISIBLE[dtype] * y.detach().abs().max()
        return y + change.view_as(y)

    def the_gradient(y):
        return y.detach() + (y - y.detach()) * (1 + VISIBLE[dtype])

    sizes = (Sizes(64, 2, 4, 40, 32, 64),)
    assert ops.check_op(op, dtype, CPU, sizes).status == "ok"
    for change in (an_element, the_gradient):

        def changed(*args, change=change, **kwargs):
            out = whole(*args, **kwargs)
            return out._replace(gates=change(out.gates)) if op == "router" else change(out)

        monkeypatch.setattr(kernels, op, changed)
        check = ops.check_op(op, dtype, CPU, sizes)
        # The sums of the router are float32 for 16-bit tokens, whose gradients are rounded to 16 bits.
        assert check.status == "fails", change
        assert "is off by" in check.problem.why
        assert check.share > 1


@pytest.mark.parametrize("change", ["drop", "twice", "swap", "dtype"])
def test_wrong_slots_are_seen(change, monkeypatch):
    def wrong(slots):
        kept = (slots.view(-1) >= 0).nonzero().view(-1)
        if change == "dtype":
            return slots.long()
        slots = slots.clone()
        flat = slots.view(-1)
        if change == "drop":
            flat[kept[0]] = -1
        elif change == "twice":
            flat[kept[0]] = flat[kept[1]]
        else:
            order = flat[kept].argsort()
            ends = kept[order[[0, -1]]]
            flat[ends] = flat[ends.flip(0)]
        return slots

    whole = kernels.assign_slots
    monkeypatch.setattr(kernels, "assign_slots", lambda *args, **kwargs: wrong(whole(*args, **kwargs)))
    check = ops.check_op("assign_slots", "float32", CPU, (ODD,))
    assert check.status == "fails"
    assert "slots must" in check.problem.why


def test_a_lost_gpu_ends_the_checks(monkeypatch):
    monkeypatch.setattr(ops, "_is_lost", lambda device: True)
    broken("dispatch", "bfloat16", torch.neg, monkeypatch)
    checks = list(ops.check_all(CPU, (ODD,)))
    at = [check.status for check in checks].index("fails")
    assert (checks[at].op, checks[at].dtype) == ("dispatch", "bfloat16")
    assert {check.status for check in checks[:at]} == {"ok"}
    assert {check.status for check in checks[at + 1 :]} == {"not run"}
    text = describe(examined(checks=checks))
    assert lines_of(text, "Ops on cpu")[-3].split() == ["dropless_mlp", *4 * ["not", "run"]]


def test_what_a_process_that_dies_was_at_is_written(quick):
    steps = []
    found = examine(CPU, 0, on_step=lambda found: steps.append((found.doing, len(found.checks), found.healthy)))
    assert ("router in float32", 0, False) in steps
    assert ("dropless_mlp in float64", len(OPS) * len(DTYPES) - 1, False) in steps
    assert steps[-1] == ("", len(OPS) * len(DTYPES), True)
    assert found.healthy


def test_a_layer_that_fails_whole_is_a_problem(quick, monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(speed, "make_experts", refuses)
    found = examine(CPU, 1)
    assert [each.what for each in found.problems] == ["a whole layer"]
    assert not found.healthy


def test_process_groups_that_fail_are_told(monkeypatch):
    assert machine.groups(CPU) == ({"gloo": "a group of one process works", "nccl": "not tried: it needs a GPU"}, [])
    assert not dist.is_initialized()

    def refuses(*args, **kwargs):
        raise RuntimeError("connectFullMesh failed")

    monkeypatch.setattr(dist, "init_process_group", refuses)
    said, (problem,) = machine.groups(CPU)
    assert said["gloo"] == "fails: RuntimeError: connectFullMesh failed"
    assert "host name" in problem.advice
    assert "in refuses" in problem.traceback


def test_a_gpu_that_is_missing_is_told(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert device_or_reason("auto") == device_or_reason("cpu") == CPU
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    fails(capsys, ["doctor", "--device=cuda:0"], "sees no CUDA device, got cuda:0: no NVIDIA driver was")
    monkeypatch.setattr(machine, "driver_version", lambda: "580.1")
    fails(capsys, ["doctor", "--device=cuda"], "sees no CUDA device, got cuda:0: the driver is 580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    fails(capsys, ["doctor", "--device=cuda"], "this PyTorch", "is built without CUDA")
    fails(capsys, ["doctor", "--device=tpu"], "--device must be auto, cpu, cuda or cuda:N, got tpu")
    fails(capsys, ["doctor", "--seconds=-1"], "--seconds must be at least 0, got -1")
    fails(capsys, ["doctor", "--json=/nowhere/doctor.json"], "--json must be a file in a folder that exists")


def test_auto_is_the_first_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_or_reason("auto") == device_or_reason("cuda") == torch.device("cuda:0")
    assert device_or_reason("cuda:1") == torch.device("cuda:1")
    assert device_or_reason("cpu") == CPU
    with pytest.raises(ValueError, match=r"--device must be one of 2 CUDA devices, got cuda:2$"):
        device_or_reason("cuda:2")


def test_device_auto_is_a_word(quick, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("vmoe_torch.commands.doctor.device_or_reason", lambda name: asked.append(name) or CPU)
    for words in ([], ["--device", "auto"], ["--device=cuda:1"]):
        assert main(["doctor", "--seconds=0", *words]) == 0
    assert asked == ["auto", "auto", "cuda:1"]


def test_a_card_that_does_not_run_the_kernels_is_a_problem():
    auto = dict.fromkeys(DTYPES, Choice("reference", "Triton finds no C compiler"))
    found = examined("cuda:0", auto=auto, devices=[{**GPU, "shared_memory": 101_376}])
    judge_choice(found)
    assert not found.healthy
    text = describe(found)
    assert 'impl="auto" on cuda:0: Triton finds no C compiler' in text
    assert "cuda:0: NVIDIA L4, compute capability 8.9, 58 multiprocessors, 24.0 GiB, 101,376 bytes of shared" in text
    found = examined("cuda:0", auto=dict.fromkeys(DTYPES, Choice("triton", "the card can")))
    judge_choice(found)
    assert found.healthy


def test_the_gpus_are_listed(monkeypatch):
    card = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert machine.devices()[1] == {**GPU, "shared_memory": None}


def test_driver_version_is_that_of_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('580.65.06')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver_version() == "580.65.06"


def test_remarks_name_what_is_slow_and_busy(quick, monkeypatch):
    slow = speed.Speed("float32", "forward", ours=2.0, eager=1.0, products=0.5, flops=1.0, rounds=3)
    monkeypatch.setattr(speed, "measure_all", lambda *args: iter([slow]))
    monkeypatch.setattr(examination.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    found = examine(CPU, 1)
    assert found.remarks[0] == "float32 forward: 2.0 times as long as eager PyTorch"
    assert "other jobs run here (load 99.0" in found.remarks[1]
    monkeypatch.setattr(machine, "driver_version", lambda: "470.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    if not torch.cuda.is_available():
        said = "there is an NVIDIA driver (470.1), but PyTorch, built without CUDA, sees no GPU"
        assert examine(CPU, 0).remarks == [said]
    # Slow is not wrong.
    assert found.healthy
    assert "- float32 forward: 2.0 times" in describe(found)
    slower = dataclasses.replace(slow, dtype="float16", ours=6.0, eager=6.0, products=5.5)
    monkeypatch.setattr(speed, "measure_all", lambda *args: iter([slow, slower]))
    assert "float16 forward: PyTorch's own products take 11 times as long as in float32" in examine(CPU, 1).remarks[1]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (1.0, 3)])
def test_a_round_that_warms_up_counts_only_where_it_is_all(monkeypatch, seconds, rounds):
    clock = iter(range(1000))
    monkeypatch.setattr(speed.time, "monotonic", lambda: 0.25 * next(clock))
    found = speed.measure(CPU, "float32", True, seconds, TINY)
    assert found.rounds == rounds
    assert found.flops == 3 * 4 * 8 * 16 * 4 * 8


def test_problems_are_numbered_and_plain_values():
    found = examined(problems=[Problem("a", "b", "c"), Problem("d", "e", "f", "g")])
    assert describe(found).endswith("2 problems:\n1. a: b\n   what to do: c\n2. d: e\n   what to do: f")
    found.checks = [ops.Check("router", "float32", "fails", {"T=1": {"gates": no_number()}})]
    plain = found.as_dict()
    assert plain["checks"][0]["results"]["T=1"]["gates"]["error"] is None
    json.dumps(plain, allow_nan=False)


def no_number():
    """A comparison of what is no number."""
    return ops.Comparison(torch.inf, 0.0, 0.0, "gates must be finite")
