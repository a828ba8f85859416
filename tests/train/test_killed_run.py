"""Experts on two processes: a killed run restarts and ends with the bits of one never killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.utils.data import DataLoader, TensorDataset

from vmoe_torch.parallel import full_state_dict
from vmoe_torch.train import load_model, train
from vmoe_torch.train.process_group import Processes
from vmoe_torch.train.record.table import read_table
from vmoe_torch.train.spread import EvenShares
from vmoe_torch.train.step import Update
from vmoe_torch.train.validation import validate

PROGRAM = Path(__file__).with_name("killed_run.py")


def run_two(config, folder, *deaths):
    """Weights that two processes ended with, one restart for each death, and what torchrun said."""
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(config.override(f"run.output={folder}").to_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, f"--max-restarts={len(deaths)}", "--monitor-interval=0.2", PROGRAM, file, *deaths]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "model.safetensors"), done.stderr


def test_killed_run_ends_with_the_bits_of_one_never_killed(tiny, tmp_path):
    config = tiny.override(
        "optim.ema_decay=none",
        "schedule.epochs=2",
        "run.checkpoint_every=2",
        "parallel.ep=2",
        "parallel.dp=1",
        "parallel.materialize=true",
    )
    whole, _ = run_two(config, tmp_path / "whole")
    killed, log = run_two(config, tmp_path / "killed", "1@3", "0@save", "1@4")
    assert log.count("(exitcode: -9)") >= 3
    assert whole.keys() == killed.keys()
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name
    columns = ("update", "train_loss", "val_loss", "val_accuracy")
    metrics = [
        [[row[column] for column in columns] for row in read_table(tmp_path / folder / "metrics.csv")]
        for folder in ("whole", "killed")
    ]
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == 2
    assert not list((tmp_path / "killed" / "checkpoints").glob(".update_*"))
    # The best weights are one file, and a run goes on with any number of processes.
    model, _, _ = load_model(tmp_path / "whole")
    assert {name for name, _ in model.named_parameters()} == whole.keys()
    again = train(config.override(f"run.output={tmp_path}/whole", "parallel.ep=1"), resume=True)
    assert again.updates == 10
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_spread_run_without_torchrun_is_refused(tiny):
    config = tiny.override("optim.ema_decay=none")
    with pytest.raises(ValueError, match="need torchrun, got a process started without it"):
        train(config.override("parallel.ep=2"))
    for change, message in (
        ("optim.ema_decay=0.9", "optim.ema_decay must be null with parallel.ep or fsdp, got 0.9"),
        ("optim.name=muon", "must be one of adam, adamw"),
        ("run.precision=float16", "must be one of float32, bfloat16, got 'float16'"),
        ("parallel.wire=int8", "parallel.wire must be one of"),
        ("model.pretrained=true", "parallel.materialize must be false with model.pretrained"),
        ("parallel.chunks=0", "parallel.chunks must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config.override("parallel.ep=2", "parallel.materialize=true", change))


def test_one_process_runs_the_path_of_many(tiny, tmp_path, monkeypatch):
    config = tiny.override("optim.ema_decay=none", "schedule.epochs=1")
    plain = train(config)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        spread = config.override("parallel.fsdp=true", f"run.output={tmp_path}/spread")
        train(spread.override("run.max_updates=2"))
        result = train(spread, resume=True)
        with pytest.raises(
            ValueError, match=r"parallel.dp \* parallel.ep must be the number of processes 1, got 0 \* 2"
        ):
            train(config.override("parallel.ep=2", f"run.output={tmp_path}/other"))
        assert sorted(path.name for path in (tmp_path / "spread" / "checkpoints").glob("update_*")) == [
            "update_00000002",
            "update_00000005",
        ]
        assert result.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-4)
        # Adam turns the smallest difference of a tiny gradient into a step of the learning rate.
        want = plain.model.state_dict()
        for name, tensor in full_state_dict(result.model, keep=True).items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-2, atol=2e-3, msg=name)
        # A run that was not spread goes on spread, from where it was.
        moved = config.override(f"run.output={tmp_path}/moved")
        train(moved.override("run.max_updates=2"))
        updates, update = [], Update.__call__
        monkeypatch.setattr(Update, "__call__", lambda self, batches: updates.append(1) or update(self, batches))
        ended = train(moved.override("parallel.fsdp=true"), resume=True)
        assert len(updates) == 3
        assert ended.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-4)
        for name, tensor in full_state_dict(ended.model, keep=True).items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-2, atol=2e-3, msg=name)
    finally:
        dist.destroy_process_group()


def test_nan_waits_for_the_checkpoint_on_its_way(tiny, tmp_path, monkeypatch):
    config = tiny.override("optim.ema_decay=none", "run.checkpoint_every=2", "run.log_every=1", "parallel.fsdp=true")
    original_write, original_loss = FileSystemWriter.write_data, nn.CrossEntropyLoss.forward
    losses = []

    def write(*arguments):
        time.sleep(1)
        return original_write(*arguments)

    def loss(self, logits, labels):
        losses.append(original_loss(self, logits, labels))
        return losses[-1] * (float("nan") if len(losses) == 3 else 1)

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", loss)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(FloatingPointError, match=r"in update 3.*; the last good checkpoint is .*update_00000002"):
            train(config.override("data.mixup=0"))
    finally:
        dist.destroy_process_group()


def test_even_shares_fill_up_and_do_not_count():
    data = TensorDataset(torch.randn(5, 3), torch.arange(5) % 3)
    model = nn.Linear(3, 3)
    logits, labels = model(data.tensors[0]), data.tensors[1]
    sums = []
    for rank in range(3):
        group = Processes(rank, 3, torch.device("cpu"))
        shares = EvenShares(data, group)
        assert len(shares) == 6
        mine = [shares[index] for index in range(rank * 2, rank * 2 + 2)]
        loader = DataLoader(mine, batch_size=1)
        alone = Processes(0, 1, group.device)
        loss, accuracy = validate(model, loader, alone, count=shares.own)
        sums.append((shares.own, loss * shares.own, accuracy * shares.own))
    own, loss, correct = (sum(column) for column in zip(*sums))
    assert own == 5
    assert loss / 5 == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert correct == (logits.argmax(1) == labels).sum()


def test_validation_gives_every_module_its_mode_back():
    alone = Processes(0, 1, torch.device("cpu"))
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    model[1].eval()
    batch = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)

    def broken():
        assert not model.training
        yield batch
        raise OSError("broken")

    for batches, stop in (([batch], lambda: False), ([batch], lambda: True)):
        validate(model, batches, alone, stop=stop)
        assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(OSError, match="broken"):
        validate(model, broken(), alone)
    assert [module.training for module in model.modules()] == [True, True, False]
