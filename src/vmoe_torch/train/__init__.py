"""Training: `train(config)`, its configuration, and its checkpoints."""

from vmoe_torch.train.build import build_data, build_model, build_transforms
from vmoe_torch.train.checkpoint import load_model, load_weights, read_checkpoint
from vmoe_torch.train.config import Config
from vmoe_torch.train.loop import TrainResult, train
from vmoe_torch.train.muon import ExpertMuon, create_muon

__all__ = [
    "Config",
    "ExpertMuon",
    "TrainResult",
    "build_data",
    "build_model",
    "build_transforms",
    "create_muon",
    "load_model",
    "load_weights",
    "read_checkpoint",
    "train",
]
