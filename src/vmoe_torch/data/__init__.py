"""Images and videos to train on: the Fashion-MNIST subset that ships with the package, folders of images and of videos,
WebDataset's shards, characters in typefaces, data sets of timm's, and reproducible loaders."""

from vmoe_torch.data.clips import ClipTiming, ClipTransform
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
from vmoe_torch.data.video import Video
from vmoe_torch.data.video_folder import VideoFolder

__all__ = [
    "BrokenImageError",
    "ClipTiming",
    "ClipTransform",
    "Distort",
    "EpochSampler",
    "FashionMnist",
    "ImageFolder",
    "LabelledImages",
    "NamedDataset",
    "TarShards",
    "Typefaces",
    "Video",
    "VideoFolder",
    "described",
    "evaluation_loader",
    "open_data",
    "read_image",
    "training_loader",
]
