"""The original's checkpoints: read, written, converted; and dense models turned sparse."""

from vmoe_torch.checkpoints.convert import convert, export_original
from vmoe_torch.checkpoints.pretrained import cached_checkpoint
from vmoe_torch.checkpoints.reader import read_index, read_original
from vmoe_torch.checkpoints.sources import load_original, read_weights
from vmoe_torch.checkpoints.upcycle import upcycle, upcycle_optimizer
from vmoe_torch.checkpoints.wire import CheckpointError
from vmoe_torch.checkpoints.writer import write_original

__all__ = [
    "CheckpointError",
    "cached_checkpoint",
    "convert",
    "export_original",
    "load_original",
    "read_index",
    "read_original",
    "read_weights",
    "upcycle",
    "upcycle_optimizer",
    "write_original",
]
