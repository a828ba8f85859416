"""The search over launch configs: it times what is right, and suggests the fastest entry."""

import time

import pytest
import torch

from benchmarks.compile import tune
from vmoe_kernels.common import launch
from vmoe_kernels.common.launch import ANY, Config

CPU = torch.device("cpu")
SLOW, FAST, WRONG, BROKEN = (Config({"WAIT": wait}, num_warps=4) for wait in (0.004, 0.0, -1.0, -2.0))


def kernel() -> dict[str, torch.Tensor]:
    """Stands for an op that asks the table and launches."""
    wait = launch.look_up("op", CPU, "le64").constexprs["WAIT"]
    if wait == -2.0:
        raise RuntimeError("out of resources: shared memory\nand more")
    time.sleep(max(wait, 0.0))
    return {"out": torch.full((4,), 2.0 if wait < 0 else 1.0)}


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    monkeypatch.setattr(launch, "_TABLES", {})
    monkeypatch.setattr(launch, "_CANDIDATES", {})
    launch.register_table("op", {(ANY, ANY, ANY): SLOW}, candidates=(FAST, WRONG, BROKEN))


def test_search_suggests_the_fastest_right_config():
    (found,) = tune.search({"workload": kernel, "other": kernel}, CPU, seconds=0.02)
    assert found["config"]["constexprs"] == {"WAIT": 0.0}
    assert found["today"]["constexprs"] == {"WAIT": 0.004}
    assert found["microseconds"] < 4000 <= found["today_microseconds"]
    assert found["key"] == [ANY, launch.triton_version(), "le64"]
    assert found["workload"] == "workload"
    assert [each["why"] for each in found["left_out"]] == [
        "results are off by 1.0e+00",
        "out of resources: shared memory",
    ]
    assert launch.look_up("op", CPU) == SLOW


def test_search_keeps_to_the_ops_asked_for():
    assert list(tune.search({"workload": kernel}, CPU, ops=["another"], seconds=0.01)) == []


def test_line_is_an_entry_to_paste(tmp_path):
    (found,) = tune.search({"workload": kernel}, CPU, seconds=0.01)
    text = tune.line(found)
    assert "'le64'): Config({'WAIT': 0.0}, num_warps=4, num_stages=1, max_registers=None)," in text
    assert "us today" in text
    path = tune.write_found([found], tune.LAYERS[0], "bfloat16", CPU, tmp_path)
    assert text in path.read_text()
    assert path.with_suffix(".json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_main_needs_a_gpu(capsys):
    assert tune.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
