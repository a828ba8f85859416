"""The original's checkpoints: read, written, converted; and dense models turned sparse."""

from vmoe_torch.checkpoints.convert import convert, export_original, load_original
from vmoe_torch.checkpoints.reader import read_index, read_original
from vmoe_torch.checkpoints.wire import CheckpointError
from vmoe_torch.checkpoints.writer import write_original

__all__ = [
    "CheckpointError",
    "convert",
    "export_original",
    "load_original",
    "read_index",
    "read_original",
    "write_original",
]
