"""Training: `train(config)`, its configuration, and its checkpoints."""

from vmoe_torch.train.build import build_data, build_model, build_transforms
from vmoe_torch.train.checkpoint import load_model, load_weights, read_checkpoint
from vmoe_torch.train.config import Config
from vmoe_torch.train.loop import TrainResult, train

__all__ = [
    "Config",
    "TrainResult",
    "build_data",
    "build_model",
    "build_transforms",
    "load_model",
    "load_weights",
    "read_checkpoint",
    "train",
]
