"""Two processes over gloo: the same training as one, and the same resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmoe_torch.train import train
from vmoe_torch.train.process_group import processes

PROGRAM = Path(__file__).with_name("two_processes.py")


def run_two(config, folder):
    """Weights that each of two processes ended with."""
    file = folder / "config.json"
    file.write_text(config.override(f"run.output={folder}").to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM, file]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes_train_as_one_and_resume_to_equal_bits(tiny, tmp_path):
    # Without noise and dropping, and in groups of one image, the processes' means are those of one process.
    config = tiny.override(
        "data.mixup=0",
        "optim.accumulation=2",
        "optim.ema_decay=none",
        "schedule.epochs=1",
        "model.kwargs.proj_drop_rate=0",
        "model.kwargs.drop_path_rate=0",
        "model.kwargs.noise_std=0",
        "model.kwargs.group_size=image",
    )
    one = train(config.override("optim.accumulation=1"))
    # Adam turns the smallest difference of a tiny gradient into a step of the learning rate.
    two = run_two(config, tmp_path)
    assert (tmp_path / "whole" / "metrics.csv").is_file()
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(two[0]["whole"][name], tensor, rtol=1e-2, atol=2e-4, msg=name)
        assert torch.equal(two[0]["whole"][name], two[1]["whole"][name]), name
        assert torch.equal(two[0]["whole"][name], two[0]["resumed"][name]), name
    assert two[0]["history"][0]["val_accuracy"] == pytest.approx(one.history[0]["val_accuracy"], abs=0.051)
    assert two[0]["history"][0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-3)


def test_processes_is_one_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes("cpu") as group:
        assert (group.rank, group.world_size, group.device) == (0, 1, torch.device("cpu"))
        assert group.gather("x") == ["x"]
        model = torch.nn.Linear(1, 1)
        assert group.replicate(model) is model
