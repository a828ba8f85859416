"""Images to train on: the Fashion-MNIST subset that ships with the package, image folders, WebDataset's shards,
characters in typefaces, data sets of timm's, and reproducible loaders."""

from vmoe_torch.data.distort import Distort
from vmoe_torch.data.factory import open_data
from vmoe_torch.data.fashion_mnist import FashionMnist
from vmoe_torch.data.folder import ImageFolder
from vmoe_torch.data.image import BrokenImageError, read_image
from vmoe_torch.data.labelled import LabelledImages
from vmoe_torch.data.loader import EpochSampler, evaluation_loader, training_loader
from vmoe_torch.data.named import NamedDataset, described
from vmoe_torch.data.shards import TarShards
from vmoe_torch.data.typefaces import Typefaces

__all__ = [
    "BrokenImageError",
    "Distort",
    "EpochSampler",
    "FashionMnist",
    "ImageFolder",
    "LabelledImages",
    "NamedDataset",
    "TarShards",
    "Typefaces",
    "described",
    "evaluation_loader",
    "open_data",
    "read_image",
    "training_loader",
]
