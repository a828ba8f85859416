"""Soft MoE S/16 (128 experts of one slot in the second half) from scratch on ImageNet-21k, as the original trains.

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe pretrain_soft_moe data.root=IMAGENET21K
Data: folders train/ and val/ with one folder for each of the 21,843 classes; the original's JFT-4B is not public.
Hardware: 8 GPUs of 80 GB; `vmoe plan soft_moe_s16 --gpus 8 --ep 8 --batch-size 4096` says what fits.
Cost: 300,000 updates of 4,096 images; the original took 4,000,000.
Result: not yet run.
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """Sigmoid loss, no augmentation but crops and mirrors, no dropout; kernels and scales decay by 0.03, the head by 3.

    The slots `mu` do not decay. Peak, warm-up and decays are the original's, with its linear schedule.
    """
    return Config.from_dict(
        {
            # -log(classes): the sigmoids begin as rare as the classes are.
            "model": {"name": "soft_moe_s16", "kwargs": {"head_bias_init": -9.991636}},
            "data": {
                "batch_size": 4096,
                "eval_batch_size": 256,
                "workers": 12,
                "interpolation": "bilinear",
                "scale": [0.05, 1.0],
            },
            "loss": {"kind": "sigmoid"},
            "optim": {
                "name": "adamw",
                "lr": 8e-4,
                "betas": [0.9, 0.999],
                "weight_decay": 0.03,
                "head_weight_decay": 3.0,
                "decay": "kernels",
                "clip_norm": 1.0,
            },
            "schedule": {"name": "linear", "updates": 300_000, "warmup_updates": 10_000},
            "run": {"output": "runs/pretrain_soft_moe", "precision": "bfloat16", "checkpoint_every": 1000},
        }
    )
