"""Reading a checkpoint of the original against reading its files and throwing the bytes away.

    python -m benchmarks.models.checkpoint_read [--gigabytes 1.2] [--shards 1 4] [--rounds 9] [--disk FOLDER]

The arrays have the shapes of the released B/16 with 8 experts. Both variants read the same files in turn, in two
states: "cold", dropped from the page cache before each run (posix_fadvise; a disk's own or a host's cache is out of
reach), which gives the disk's rate and has the bar; and "warm", all in the page cache, where one variant reuses 8 MB of
memory and the other has to be given 1.2 GB. Before each run as much memory as a run takes is touched and freed: on a
virtual machine the first touch of memory that its host took back can cost ten times what reading costs. What a run
returns is freed after its time is taken. Writes benchmarks/results/<machine>/models_checkpoint_read.{json,md}.
"""

import mmap
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.protocol import Samples
from benchmarks.harness.results import (
    Row,
    as_dicts,
    command_line,
    environment,
    heading,
    machine_name,
    publish,
    row,
    table,
)
from vmoe_torch.checkpoints import read_original, write_original

BAR = 0.5
_BLOCK = 8 << 20


def make_arrays(gigabytes: float) -> dict[str, Tensor]:
    """Expert and dense MLPs of B/16 with E=8, block after block, until there are so many bytes."""
    arrays, size, block = {}, 0, 0
    while size < gigabytes * 1e9:
        below = f"params/Encoder/encoderblock_{block}/"
        shapes = {"Mlp": ()} if block % 2 == 0 else {"Moe/Mlp": (8,)}
        for name, experts in shapes.items():
            for dense, shape in (("Dense_0", (768, 3072)), ("Dense_1", (3072, 768))):
                arrays[f"{below}{name}/{dense}/kernel"] = torch.randn(*experts, *shape)
                arrays[f"{below}{name}/{dense}/bias"] = torch.randn(*experts, shape[1])
        size = sum(tensor.nbytes for tensor in arrays.values())
        block += 1
    return arrays


def read_files(paths: list[Path], buffer: memoryview) -> None:
    """Every file from begin to end, into the same memory: the sequential rate."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                continue


def drop_from_cache(paths: list[Path]) -> None:
    """Leaves no page of the files in the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(size: int) -> None:
    """So many bytes of fresh memory, each page written once and given back."""
    torch.empty(size, dtype=torch.uint8)[:: mmap.PAGESIZE] = 1


def bench(folder: Path, arrays: dict[str, Tensor], shards: int, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Rows, and the median ratio of our rate to the sequential one by state."""
    prefix = folder / f"of{shards}"
    write_original(prefix, arrays, num_shards=shards)
    paths = sorted(folder.glob(f"of{shards}.*"))
    size = sum(path.stat().st_size for path in paths)
    got = read_original(str(prefix))
    if any(not torch.equal(got[name], tensor) for name, tensor in arrays.items()):
        raise RuntimeError("what was read is not what was written")
    del got
    # Page aligned: some processors copy several times slower to addresses a few bytes past the source's.
    buffer = memoryview(mmap.mmap(-1, _BLOCK))
    calls = {"sequential": lambda: read_files(paths, buffer), "ours": lambda: read_original(str(prefix))}
    rows, ratios = [], {}
    for state in ("warm", "cold"):
        seconds = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                # The arrays and the page cache.
                touch_memory(2 * size)
                if state == "cold":
                    drop_from_cache(paths)
                else:
                    read_files(paths, buffer)
                begin = time.perf_counter()
                result = call()
                seconds[name].append(time.perf_counter() - begin)
                del result
        samples = {name: Samples(tuple(values)) for name, values in seconds.items()}
        case = f"{size / 1e9:.2f} GB in {shards} shards, {state}"
        rows += [row("checkpoint_read", "forward", case, name, samples[name], num_bytes=size) for name in calls]
        ratios[case] = samples["sequential"].over(samples["ours"]).median
    for path in paths:
        path.unlink()
    return rows, ratios


def markdown(content: dict) -> list[str]:
    """The results file."""
    lines = heading("Reading a checkpoint", content["environment"]) + table(content["rows"])
    lines += ["", "| rate over the sequential one | bar | measured | met |", "| --- | --- | --- | --- |"]
    for case, ratio in content["ratios"].items():
        bar, met = (content["bar"], "yes" if ratio >= content["bar"] else "no") if case.endswith("cold") else ("", "")
        lines.append(f"| {case} | {bar} | {ratio:.2f} | {met} |")
    return lines


def main(arguments: list[str] | None = None) -> Path:
    """Writes the results; returns the path of the Markdown."""
    parser = command_line(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="size of the checkpoint (%(default)s)")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4], help="numbers of data files (1 4)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each variant (%(default)s)")
    parser.add_argument("--disk", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    options = parser.parse_args(arguments)
    arrays = make_arrays(options.gigabytes)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        for shards in options.shards:
            more, ratio = bench(Path(folder), arrays, shards, options.rounds)
            rows += more
            ratios |= ratio
    cpu = torch.device("cpu")
    made = environment(cpu) | {"load": f"{os.getloadavg()[0]:.1f}"}
    content = {"environment": made, "rows": as_dicts(rows), "ratios": ratios, "bar": BAR}
    return publish(options.out / machine_name(cpu), "models_checkpoint_read", content, markdown)


if __name__ == "__main__":
    main()
