"""A trained run and folders of images that every command may be tried on."""

from pathlib import Path

import pytest

from vmoe_torch.data import FashionMnist
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config, train

MODEL = ("patch_size=14", "embed_dim=32", "depth=2", "num_heads=2", "mlp_ratio=1.0", "num_experts=4")


def small_run(folder: Path) -> Config:
    """A run of two updates on Fashion-MNIST."""
    return load_recipe("fashion_mnist").override(
        f"run.output={folder}",
        "run.device=cpu",
        "run.progress=false",
        "run.max_updates=2",
        "data.batch_size=64",
        *(f"model.kwargs.{change}" for change in MODEL),
    )


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Folder of a run of two updates."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(small_run(folder))
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
