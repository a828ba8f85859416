"""Images to train on: the Fashion-MNIST subset that ships with the package, image folders, WebDataset's shards, data
sets of timm's, and reproducible loaders."""

from vmoe_torch.data.fashion_mnist import FashionMnist
from vmoe_torch.data.folder import ImageFolder
from vmoe_torch.data.image import BrokenImageError, read_image
from vmoe_torch.data.loader import EpochSampler, evaluation_loader, training_loader
from vmoe_torch.data.named import NamedDataset
from vmoe_torch.data.shards import TarShards

__all__ = [
    "BrokenImageError",
    "EpochSampler",
    "FashionMnist",
    "ImageFolder",
    "NamedDataset",
    "TarShards",
    "evaluation_loader",
    "read_image",
    "training_loader",
]
