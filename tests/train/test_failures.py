"""Runs that end early: killed in the middle of saving, told to stop, out of disk. No checkpoint is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from vmoe_torch.data.loader import SeededDataset
from vmoe_torch.train import read_checkpoint, train
from vmoe_torch.train.loop import TrainingRun
from vmoe_torch.train.record.table import CsvTable, read_table
from vmoe_torch.train.step import Update

PROGRAM = Path(__file__).with_name("stopped_run.py")
# README and docs tell users to give a run this long between SIGTERM and SIGKILL, beside the time that one update takes.
SECONDS_TO_STOP = 30.0


class Stopped:
    """The run in a process group of its own, which ends with the `with` block; what it says on stderr is in `log`."""

    def __init__(self, config, *arguments):
        folder = Path(config.run.output)
        folder.mkdir(parents=True, exist_ok=True)
        file, self.log = folder.with_suffix(".json"), folder.with_suffix(".log")
        file.write_text(config.to_json())
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, file, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def checkpoints(config):
    """Names of the files in the checkpoint folder."""
    return sorted(path.name for path in (Path(config.run.output) / "checkpoints").iterdir())


def test_kill_in_the_middle_of_saving_loses_no_checkpoint(tiny):
    config = tiny.override("run.checkpoint_every=2", "run.keep_checkpoints=1")
    with Stopped(config, "4") as run:
        assert run.process.wait(120) == -signal.SIGKILL, run.log.read_text()
    part, last = checkpoints(config)
    assert part == ".update_00000004"
    assert last == "update_00000002"
    assert read_checkpoint(config.run.output)["update"] == 2
    with pytest.warns(UserWarning, match=r"\.update_00000004 is half-written, skipped"):
        assert train(config, resume=True).finished
    assert checkpoints(config) == ["best.safetensors", "update_00000010"]


@pytest.fixture(autouse=True)
def interruptible():
    """Whoever starts pytest in the background of a script has it ignore SIGINT, which a run would do as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_signal_to_all_processes_saves_and_exits_with_0_in_time(tiny, told):
    config = tiny.override("schedule.epochs=100000", "data.workers=1", "run.log_every=1")
    progress = Path(config.run.output) / "progress.csv"
    with Stopped(config) as run:
        while len(read_table(progress)) < 3:
            assert run.process.poll() is None, run.log.read_text()
            time.sleep(0.05)
        os.killpg(run.process.pid, told)
        began = time.monotonic()
        code = run.process.wait(120)
        assert (code, time.monotonic() - began < SECONDS_TO_STOP) == (0, True), run.log.read_text()
    assert read_checkpoint(Path(config.run.output) / "checkpoints" / checkpoints(config)[-1])["update"] >= 3
    assert not [name for name in checkpoints(config) if name.startswith(".")]
    assert ("Ctrl-C once more stops at once" in run.log.read_text()) == (told == signal.SIGINT)


@pytest.mark.parametrize("worker", [0, 1])
def test_second_interrupt_stops_at_once(tiny, monkeypatch, worker):
    before = signal.getsignal(signal.SIGINT)
    original = Update.__call__

    def update(self, batches):
        if self.state.update == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)

    monkeypatch.setattr(Update, "__call__", update)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.override(f"data.workers={worker}"))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (Path(tiny.run.output) / "checkpoints").exists()


def test_signal_is_obeyed_while_a_worker_hangs(tiny, monkeypatch):
    item = SeededDataset._item

    def hangs(self, epoch, index):
        if epoch == 1:
            time.sleep(600)
        return item(self, epoch, index)

    monkeypatch.setattr(SeededDataset, "_item", hangs)
    epoch, killers = TrainingRun._end_epoch, []

    def end_epoch(self, *arguments):
        row = epoch(self, *arguments)
        killers.append(subprocess.Popen(["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}"]))
        return row

    monkeypatch.setattr(TrainingRun, "_end_epoch", end_epoch)
    began = time.monotonic()
    result = train(tiny.override("data.workers=1"))
    assert [killer.wait() for killer in killers] == [0]
    assert (result.updates, result.finished) == (5, False)
    assert time.monotonic() - began < 120
    assert checkpoints(tiny)[-1] == "update_00000005"
    assert not read_checkpoint(Path(tiny.run.output) / "checkpoints" / "update_00000005")["pending"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_names_the_file_and_keeps_the_last_checkpoint(tiny, monkeypatch):
    config = tiny.override("run.checkpoint_every=2", "run.keep_checkpoints=1", "run.max_updates=4")
    write = FileSystemWriter.write_data

    def full(self, *arguments):
        if self.path.name == ".update_00000004":
            (self.path / "__0_0.distcp").symlink_to("/dev/full")
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match=r"checkpoint .*update_00000004 cannot be written: No space left on device; \d"):
        train(config)
    monkeypatch.undo()
    assert checkpoints(config) == ["update_00000002"]
    assert train(config, resume=True).updates == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_names_the_table(tmp_path):
    table = CsvTable(tmp_path / "a.csv", ("update", "text"), 0)
    table.path.unlink()
    table.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"table .*a\.csv cannot be written: No space left on device; \d+ MiB are free"):
        table.add({"update": 1, "text": "x" * 100_000})
