"""The device of a name, on machines with GPUs that are not there."""

import pytest
import torch

from tests.test_cli import fails
from vmoe_torch.train.device import chosen_device
from vmoe_torch.train.process_group import processes


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_chosen_device_takes_every_name(two_gpus):
    names = {"cpu": "cpu", "auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cuda:1": "cuda:1"}
    assert {name: str(chosen_device("x", name, 1)) for name in names} == names
    assert chosen_device("x", "auto") == torch.device("cuda:0")


@pytest.mark.parametrize("number", [2, 9, 256, 10**30])
def test_chosen_device_refuses_a_gpu_beyond_the_last(two_gpus, number):
    with pytest.raises(ValueError, match=f"^x must be one of 2 CUDA devices, got cuda:{number}$"):
        chosen_device("x", f"cuda:{number}")
    with pytest.raises(ValueError, match=r"^x must be one of 2 CUDA devices, got cuda:2$"):
        chosen_device("x", "cuda", 2)


def test_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # A driver that is too old for PyTorch still counts them.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert chosen_device("x", "auto", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^x must be cpu or auto, as PyTorch sees no CUDA device, got cuda:0$"):
        chosen_device("x", "cuda")


@pytest.mark.parametrize("command", ["eval", "fewshot", "predict", "analyze", "budget", "prune", "doctor", "train"])
def test_a_gpu_that_is_missing_is_one_line(command, two_gpus, tmp_path, capsys):
    words = {
        "eval": ["model", "--data=x"],
        "fewshot": ["model", "--data=x"],
        "predict": ["model", "x"],
        "analyze": ["model", "--data=x", f"--out={tmp_path}/out"],
        "budget": ["model", "--data=x", "--flops=0.5"],
        "prune": ["model", f"{tmp_path}/x.pt", "--keep=1", "--data=x"],
        "doctor": [],
        "train": ["data.name=fashion_mnist", f"run.output={tmp_path}/run", "run.device=cuda:9"],
    }
    device, key = ([], "run.device") if command == "train" else (["--device=cuda:9"], "--device")
    fails(capsys, [command, *words[command], *device], f"{key} must be one of 2 CUDA devices, got cuda:9")


def test_training_takes_the_gpu_of_its_rank(two_gpus, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("auto", "cuda", "cuda:0"):
        with processes(name) as group:
            assert [group.device] == taken[-1:]
    assert list(map(str, taken)) == ["cuda:1", "cuda:1", "cuda:0"]


def test_processes_of_a_machine_share_no_gpu(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = "run.device must be cuda under torchrun, which gives each process its own, got cuda:0"
    with pytest.raises(ValueError, match=message), processes("cuda:0"):
        pass
