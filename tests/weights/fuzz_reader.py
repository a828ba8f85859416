"""Coverage-guided fuzzing of the checkpoint reader (needs `pip install atheris`).

    python tests/weights/fuzz_reader.py CORPUS tests/weights/seeds -max_total_time=600 -max_len=4096

An input is the size of the index file (2 bytes, big-endian), the index file, then one data shard. New inputs go to the
folder CORPUS. Any exception but CheckpointError, a result larger than the input, or memory past -rss_limit_mb is a
finding. `--write-seeds` writes the seeds anew.
"""

import struct
import sys
import tempfile
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"


def one_input(data: bytes, folder: Path) -> None:
    """Reads one checkpoint."""
    from vmoe_torch.checkpoints import CheckpointError, read_original

    if len(data) < 2:
        return
    size = struct.unpack(">H", data[:2])[0]
    (folder / "x.index").write_bytes(data[2 : 2 + size])
    (folder / "x.data-00000-of-00001").write_bytes(data[2 + size :])
    try:
        got = read_original(str(folder / "x"), threads=1)
    except CheckpointError:
        return
    held = sum(tensor.nbytes for tensor in got.values())
    if held > len(data):
        raise AssertionError(f"{held} bytes out of {len(data)}")


def write_seeds() -> None:
    """Small checkpoints with every feature of the format."""
    import torch

    from vmoe_torch.checkpoints import write_original
    from vmoe_torch.weights.original import writer

    writer.MAX_PIECE_BYTES = 40
    trees = {
        "scalar": ({"s": torch.tensor(3)}, None),
        "cut": ({"a/w": torch.arange(24.0).view(4, 6), "a/b": torch.zeros(3, dtype=torch.bfloat16)}, {"e": {}}),
        "dtypes": ({name: torch.zeros(1, dtype=dtype) for dtype, name in writer.DTYPE_NAMES.items()}, {"n": None}),
        "empty": ({"z": torch.zeros(0, 2), "t": torch.ones(2, 1, 2, dtype=torch.bool)}, None),
    }
    SEEDS.mkdir(exist_ok=True)
    for name, (tree, empty) in trees.items():
        with tempfile.TemporaryDirectory() as folder:
            write_original(f"{folder}/x", tree, max_chunk_bytes=32, empty=empty)
            index = Path(folder, "x.index").read_bytes()
            shard = Path(folder, "x.data-00000-of-00001").read_bytes()
        old = index.removesuffix(b"\xa7version\xa820220622")
        (SEEDS / f"{name}.bin").write_bytes(struct.pack(">H", len(index)) + index + shard)
        (SEEDS / f"{name}_no_version.bin").write_bytes(struct.pack(">H", len(old)) + b"\x82" + old[1:] + shard)


def main() -> None:
    """Fuzzes until libFuzzer stops."""
    import atheris

    with atheris.instrument_imports(include=["vmoe_torch.checkpoints"]):
        import vmoe_torch.checkpoints  # noqa: F401
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        atheris.Setup(sys.argv, lambda data: one_input(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    write_seeds() if "--write-seeds" in sys.argv else main()
