"""A trained run and folders of images that every command may be tried on."""

import pytest

from tests.tiny import small_config
from vmoe_torch.data import FashionMnist
from vmoe_torch.train import train


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Folder of a run of two updates."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(small_config(folder))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder with `train` and `val`, each with folders of Fashion-MNIST images of three classes, 4 of each."""
    folder = tmp_path_factory.mktemp("images")
    for split, data in (("train", FashionMnist("train")), ("val", FashionMnist("test"))):
        for label in (1, 5, 8):
            inside = folder / split / data.class_names[label]
            inside.mkdir(parents=True)
            for number, index in enumerate((data.labels == label).nonzero()[0][:4]):
                data[index][0].save(inside / f"{number}.png")
    return folder
