"""A small V-MoE on the Fashion-MNIST images that ship with the package.

Command: vmoe train --recipe fashion_mnist
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """6 blocks of width 128 on 7 x 7 patches of 4 x 4 pixels, 8 experts in every other block."""
    model = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 4.0,
        "num_experts": 8,
    }
    return Config.from_dict(
        {
            "model": {"name": "vmoe_s32", "kwargs": model},
            "data": {"name": "fashion_mnist", "batch_size": 128, "crop_pct": 1.0, "scale": [0.6, 1.0]},
            "optim": {"lr": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0},
            "schedule": {"epochs": 5, "warmup_epochs": 0.5, "min_lr": 1e-5},
            "run": {"output": "runs/fashion_mnist"},
        }
    )
