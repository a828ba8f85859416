"""Many runs that are told to stop at random moments: `python -m tests.train.stress_sigterm [RUNS] [AT_ONCE]`.

Every run has a loader worker and starts another one at every validation, of which there is one in every few updates.
SIGTERM goes to all its processes, as schedulers send it. Prints each run that did not end with 0 in time, with the
stacks of its processes, and a summary; the exit code says whether there was one.
"""

import argparse
import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.tiny import tiny_config
from vmoe_torch.data.idx import write_idx
from vmoe_torch.train import read_checkpoint
from vmoe_torch.train.record.table import read_table

PROGRAM = Path(__file__).with_name("stopped_run.py")
# Seconds: until a run trains, until it has ended, and until its processes have told where they are.
TO_TRAIN, TO_STOP, TO_TELL = 600.0, 60.0, 10.0


def write_images(folder: Path) -> None:
    """Random images in the files of Fashion-MNIST."""
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 80), ("t10k", 20)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))


def stop_once(number: int, folder: Path) -> tuple[float, str | None]:
    """Starts a run, stops it at a random moment; returns the seconds that it took to end, and what was wrong."""
    config = tiny_config(folder, folder / f"run{number}").override(
        "schedule.epochs=100000", "data.workers=1", "run.log_every=1"
    )
    output = Path(config.run.output)
    output.mkdir()
    file, log = output.with_suffix(".json"), output.with_suffix(".log")
    file.write_text(config.to_json())
    with open(log, "w") as said:
        run = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", PROGRAM, file],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=said,
            start_new_session=True,
        )
    try:
        limit = time.monotonic() + TO_TRAIN
        while not read_table(output / "progress.csv"):
            if run.poll() is not None or time.monotonic() > limit:
                return 0.0, f"did not train: {log.read_text()}"
            time.sleep(0.05)
        time.sleep(random.Random(number).uniform(0, 3))
        began = time.monotonic()
        os.killpg(run.pid, signal.SIGTERM)
        try:
            code = run.wait(TO_STOP)
        except subprocess.TimeoutExpired:
            # Python's faulthandler prints the stacks.
            os.killpg(run.pid, signal.SIGABRT)
            time.sleep(TO_TELL)
            return TO_STOP, f"had not ended: {log.read_text()}"
        seconds = time.monotonic() - began
        if code != 0:
            return seconds, f"ended with {code}: {log.read_text()}"
        update = read_checkpoint(max((output / "checkpoints").glob("update_*")))["update"]
        trained = int(read_table(output / "progress.csv")[-1]["update"])
        return seconds, None if update == trained else f"trained {trained} updates, saved {update}"
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=int, default=200)
    parser.add_argument("at_once", nargs="?", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        write_images(Path(name))
        results = list(pool.map(lambda number: stop_once(number, Path(name)), range(options.runs)))
    for number, (_, problem) in enumerate(results):
        if problem is not None:
            print(f"run {number}: {problem}")
    seconds = sorted(seconds for seconds, _ in results)
    wrong = sum(problem is not None for _, problem in results)
    print(f"{len(results)} runs, {wrong} wrong; slowest {seconds[-1]:.1f} s, median {seconds[len(seconds) // 2]:.1f} s")
    sys.exit(wrong > 0)
