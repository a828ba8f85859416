"""vmoe doctor on a GPU: all ops within their budgets, the kernels chosen, NCCL in a group of one."""

import json

import pytest
import torch

from vmoe_torch.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_all_is_well_on_this_gpu(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--device=cuda:0", "--seconds=5", f"--json={file}"]) == 0, capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["auto"]["bfloat16"]["impl"] == "triton"
    assert found["auto"]["float64"]["impl"] == "reference"
    assert found["groups"]["nccl"] == "a group of one process works"
    assert found["devices"][1]["shared_memory"] >= 99 * 1024
