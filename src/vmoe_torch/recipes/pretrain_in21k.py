"""V-MoE-B/16 (every 2, E=8) from scratch on ImageNet-21k, 300 epochs with strong augmentation, as the original.

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe pretrain_in21k data.root=IMAGENET21K parallel.ep=8
Data: folders train/ and val/ with one folder for each of the 21,843 classes; the original validated on 102,400 images.
Hardware: 8 GPUs of 80 GB per node; `vmoe plan vmoe_b16_e8 --gpus 8 --ep 8 --batch-size 4096` says what fits.
Cost: about 1,030,000 updates of 4,096 images.
Result: not yet run. The original reports 85.6% top-1 on ILSVRC2012 after fine-tuning (finetune_in1k_384).
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """Sigmoid loss, RandAugment(2, 20), mixup 0.5, no dropout, decay on kernels alone."""
    return Config.from_dict(
        {
            "model": {"name": "vmoe_b16_e8", "kwargs": {"head_bias_init": -10.0}},
            "data": {
                "batch_size": 4096,
                "eval_batch_size": 256,
                "workers": 12,
                "interpolation": "bilinear",
                "scale": [0.05, 1.0],
                "auto_augment": "rand-m20-n2-mmax20-p1.0",
                "mixup": 0.5,
                "mixup_mode": "dirichlet",
            },
            "loss": {"kind": "sigmoid"},
            "optim": {
                "name": "adamw",
                "lr": 8e-4,
                "betas": [0.9, 0.999],
                "weight_decay": 0.1,
                "decay": "kernels",
                "clip_norm": 1.0,
            },
            "schedule": {"name": "linear", "epochs": 300, "warmup_updates": 10_000, "min_lr": 1e-5},
            "run": {"output": "runs/pretrain_in21k", "precision": "bfloat16", "checkpoint_every": 1000},
        }
    )
