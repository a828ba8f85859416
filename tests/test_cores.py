"""Waiting and threads: chosen before torch is loaded, in the commands' own processes, and never against the user."""

import os
import subprocess
import sys

import pytest
import torch

from vmoe_torch import cores
from vmoe_torch.cores import COUNTS, WAITING, is_command, set_waiting, threads_beside
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train.record.logs import Logs

FREE = {name: value for name, value in os.environ.items() if name not in (*WAITING, *COUNTS)}


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("python /usr/bin/vmoe train", True),
        ("python C:/venv/vmoe.exe train", True),
        ("python -u -m vmoe_torch.cli train", True),
        ("python -mvmoe_torch.demo", True),
        ("python -W ignore -X importtime -m vmoe_torch.demo", True),
        ("python -m pytest vmoe", False),
        ("python -m vmoe_torch.run train.py", False),
        ("python -c vmoe", False),
        ("python my/vmoe.py", False),
        ("python train.py -m vmoe_torch.cli", False),
        ("python", False),
    ],
)
def test_only_our_own_processes_are_ours(words, ours):
    assert is_command(words.split()) == ours


def test_waiting_of_the_user_stays():
    for name in WAITING:
        environ = {name: "active"}
        assert not set_waiting(environ)
        assert environ == {name: "active"}
    environ = {"OMP_NUM_THREADS": "1"}
    assert set_waiting(environ)
    assert environ["OMP_WAIT_POLICY"] == "passive"


def test_waiting_is_set_before_torch_is_loaded():
    # Whatever imports torch first would see the environment as it is then.
    code = """
import sys
sys.orig_argv = ["python", "-m", "vmoe_torch.cli"]
class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            import os
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit(0)
sys.meta_path.insert(0, Look())
import vmoe_torch
"""
    done = subprocess.run([sys.executable, "-c", code], env=FREE, capture_output=True, text=True)
    assert done.stdout.strip() == "passive", done.stderr
    library = code.replace("vmoe_torch.cli", "mine")
    done = subprocess.run([sys.executable, "-c", library], env=FREE, capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.parametrize(
    ("workers", "available", "threads"), [(0, 2, 2), (1, 2, 2), (2, 2, 1), (9, 2, 1), (3, 8, 6), (12, 16, 8), (1, 1, 1)]
)
def test_loaders_are_counted_in(workers, available, threads):
    assert threads_beside(workers, available) == threads


def test_cores_obey_affinity_and_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    own = tmp_path / "own"
    for text, folder, files, expected in (
        ("0::/job/step\n", "job", {"cpu.max": "150000 100000"}, 2),
        ("0::/job/step\n", "job/step", {"cpu.max": "max 100000"}, 8),
        ("0::/of/the/host\n", "", {"cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/a\n0::/\n", "cpu,cpuacct/a", {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/a\n0::/\n", "cpu/a", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
        ("7:memory:/a\n", "memory/a", {"cpu.max": "100000 100000"}, 8),
    ):
        groups = tmp_path / str(len(list(tmp_path.iterdir())))
        (groups / folder).mkdir(parents=True)
        for name, content in files.items():
            (groups / folder / name).write_text(content)
        own.write_text(text)
        assert cores.available_cores(groups, own) == expected, text
    assert cores.available_cores(tmp_path, tmp_path / "none") == 8


def test_command_says_what_it_chose(tmp_path):
    run = ["train", "--recipe=fashion_mnist", f"run.output={tmp_path}", "run.device=cpu", "run.max_updates=1"]
    run += ["run.progress=false", "data.batch_size=8", "run.tensorboard=false", "run.summary=false"]
    command = [sys.executable, "-m", "vmoe_torch.cli", *run]
    done = subprocess.run(command, env=FREE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"threads: {cores.available_cores()} on {cores.available_cores()} cores")
    assert "OMP_WAIT_POLICY=passive" in done.stderr
    set_by_user = {**FREE, "OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--resume"], env=set_by_user, capture_output=True, text=True)
    assert "threads: 1 (OMP_NUM_THREADS is set)" in done.stderr
    assert "waiting: OMP_WAIT_POLICY=active, as the environment says" in done.stderr


def test_slow_first_update_promises_nothing(tmp_path):
    config = load_recipe("fashion_mnist").override(
        f"run.output={tmp_path}", "run.tensorboard=false", "run.summary=false"
    )
    logs = Logs(config, True, torch.nn.Linear(1, 1), 5, 1000)
    bar, now = logs.bar, 1000.0
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    for update in range(200):
        now += 98.0 if update == 0 else 0.6
        logs.advance()
        if update in (5, 199):
            shown = bar.format_dict
            assert shown["n"] == 6 + update
            # tqdm takes the mean until it has printed often enough.
            rate = shown["rate"] or (shown["n"] - shown["initial"]) / shown["elapsed"]
            assert rate == pytest.approx(1 / 0.6, rel=1e-3)
    logs.close()
