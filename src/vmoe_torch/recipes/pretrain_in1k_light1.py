"""V-MoE-S/32 (last 2, E=8) from scratch on ILSVRC2012, 300 epochs with light augmentation, as the original trained it.

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe pretrain_in1k_light1 data.root=ILSVRC2012
Data: folders train/ and val/ with one folder per class each. The original chose on the last 1% of train.
Hardware: 8 GPUs of 80 GB; with fewer, optim.accumulation=N keeps the 8,192 images per update.
Cost: 46,800 updates; the original took 5 h 50 min on a TPUv3-32.
Result: not yet run. The original reports 73.1% top-1, evaluated at capacity 4.0.
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """Sigmoid loss, RandAugment(2, 10), mixup 0.2, dropout in the experts alone, decay on kernels alone."""
    return Config.from_dict(
        {
            "model": {
                "name": "vmoe_s32_last2_e8",
                # -log(classes): the sigmoids begin as rare as the classes are.
                "kwargs": {"expert_drop": 0.2, "head_bias_init": -6.907755},
            },
            "data": {
                "batch_size": 8192,
                "eval_batch_size": 256,
                "workers": 12,
                "interpolation": "bilinear",
                "scale": [0.05, 1.0],
                "auto_augment": "rand-m10-n2-p1.0",
                "mixup": 0.2,
                "mixup_mode": "dirichlet",
            },
            "loss": {"kind": "sigmoid"},
            "optim": {
                "name": "adamw",
                "lr": 3e-3,
                "betas": [0.9, 0.999],
                "weight_decay": 0.1,
                "decay": "kernels",
                "clip_norm": 1.0,
            },
            "schedule": {"name": "linear", "epochs": 300, "warmup_updates": 10_000, "min_lr": 1e-5},
            "run": {"output": "runs/pretrain_in1k_light1", "precision": "bfloat16", "checkpoint_every": 1000},
        }
    )
