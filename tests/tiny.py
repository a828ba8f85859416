"""What tests of many rooms are tried on: a tiny model, one that drops tokens, a tiny run and its images."""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import vmoe_torch  # noqa: F401  registers the models
from vmoe_torch.data import FashionMnist
from vmoe_torch.data.idx import write_idx
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_classes": 5}
DROPPING = {
    "img_size": 16,
    "in_chans": 1,
    "patch_size": 4,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 4,
    "moe_layers": "every1",
    "num_experts": 4,
    "num_selected_experts": 2,
    "capacity_factor": 0.5,
    "capacity_multiple_of": 1,
}
# Of a run: 4 patches of a Fashion-MNIST image.
RUN_MODEL = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}


def tiny_model(name: str = "test_vmoe", **changes) -> nn.Module:
    """MoE layers in blocks 1 and 3 of 4, 16 patches and a class token."""
    return timm.create_model(name, **{**SIZE, **changes})


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights that hide nothing, the same each time: a head begins at 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def dropping(**changes) -> nn.Module:
    """A model of random weights, every MLP an MoE layer with half the slots that it needs, in eval mode."""
    return randomized(tiny_model(**{**DROPPING, **changes}))


def grey_images(count: int = 5) -> Tensor:
    """(B, 1, 16, 16): of five, groups of 2 or 4 leave a smaller last one."""
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(4))


def write_fashion_mnist(folder: Path, train: int, test: int) -> None:
    """The four IDX files of the first images."""
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        data = FashionMnist(split)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", data.images[:count])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", data.labels[:count].astype("uint8"))


def small_run(folder: Path) -> list[str]:
    """What makes a run of two updates of the recipe `fashion_mnist`."""
    model = [f"model.kwargs.{name}={value}" for name, value in (RUN_MODEL | {"mlp_ratio": 1.0}).items()]
    return [f"run.output={folder}", "run.device=cpu", "run.max_updates=2", "data.batch_size=64", *model]


def small_config(folder: Path) -> Config:
    """The same as a configuration, without a progress bar."""
    return load_recipe("fashion_mnist").override(*small_run(folder), "run.progress=false")


def tiny_config(images: Path, output: Path) -> Config:
    """Five updates of 16 images per epoch, two epochs; everything random is on."""
    model = {**RUN_MODEL, "img_size": 28, "in_chans": 1, "mlp_ratio": 2.0, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    return Config.from_dict(
        {
            "model": {"name": "vmoe_s32", "kwargs": model},
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
