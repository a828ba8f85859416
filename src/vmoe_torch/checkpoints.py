"""The original's checkpoints: read, written, converted; dense models turned sparse, image models turned to video."""

from vmoe_torch.models.inflation import inflate
from vmoe_torch.models.upcycling import upcycle, upcycle_optimizer
from vmoe_torch.weights.conversion import convert
from vmoe_torch.weights.exporting import export_original
from vmoe_torch.weights.original.reader import read_index, read_original
from vmoe_torch.weights.original.wire import CheckpointError
from vmoe_torch.weights.original.writer import write_original
from vmoe_torch.weights.pretrained import cached_checkpoint
from vmoe_torch.weights.sources import load_original, read_weights

__all__ = [
    "CheckpointError",
    "cached_checkpoint",
    "convert",
    "export_original",
    "inflate",
    "load_original",
    "read_index",
    "read_original",
    "read_weights",
    "upcycle",
    "upcycle_optimizer",
    "write_original",
]
