"""A run so small that a test may make several."""

import pytest

from vmoe_torch.data import FashionMnist
from vmoe_torch.data.idx import write_idx
from vmoe_torch.train import Config

MODEL = {
    "img_size": 28,
    "patch_size": 14,
    "in_chans": 1,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "num_experts": 4,
}


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder of Fashion-MNIST files with 80 training and 20 test images."""
    folder = tmp_path_factory.mktemp("images")
    for split, prefix, count in (("train", "train", 80), ("test", "t10k", 20)):
        data = FashionMnist(split)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", data.images[:count])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", data.labels[:count].astype("uint8"))
    return folder


@pytest.fixture
def tiny(tiny_images, tmp_path):
    """Five updates of 16 images per epoch, two epochs; everything random is on."""
    return tiny_config(tiny_images, tmp_path / "run")


def tiny_config(images, output):
    """The same of any folder of images."""
    return Config.from_dict(
        {
            "model": {"name": "vmoe_s32", "kwargs": {**MODEL, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}},
            "data": {
                "name": "fashion_mnist",
                "root": str(images),
                "batch_size": 16,
                "crop_pct": 1.0,
                "auto_augment": "rand-m5-n1",
                "random_erasing": 0.3,
                "mixup": 0.2,
            },
            "optim": {"lr": 3e-3, "ema_decay": 0.9},
            "schedule": {"epochs": 2, "warmup_epochs": 0.5},
            "run": {
                "output": str(output),
                "device": "cpu",
                "progress": False,
                "tensorboard": False,
                "summary": False,
                "log_every": 2,
            },
        }
    )
