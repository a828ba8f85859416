"""Images to train on: the Fashion-MNIST subset that ships with the package, image folders, and reproducible loaders."""

from vmoe_torch.data.fashion_mnist import FashionMnist
from vmoe_torch.data.folder import ImageFolder, read_image
from vmoe_torch.data.loader import EpochSampler, evaluation_loader, training_loader

__all__ = ["EpochSampler", "FashionMnist", "ImageFolder", "evaluation_loader", "read_image", "training_loader"]
