"""The released V-MoE-S/32 fine-tuned on ILSVRC2012 at 384 px, as the original did it.

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe finetune_in1k_384 data.root=ILSVRC2012
Another start: model.checkpoint=RUN, FILE.safetensors or PREFIX. V-MoE-B/16: model.name=vmoe_b16_e8_384
model.checkpoint=vmoe_b16_e8.randaug_strong_in21k run.output=runs/finetune_b16
Data: folders train/ and val/ with one folder per class each.
Hardware: 8 GPUs; one does it with optim.accumulation=8.
Cost: 10,000 updates of 1,024 images; the original took 48 min on a TPUv3-8.
Result: not yet run. The original reports 75.9% top-1 for S/32 and 85.6% for B/16, the means of three seeds.
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """A new head, resized positions, capacity 1.5, softmax loss, SGD with momentum, cosine schedule."""
    return Config.from_dict(
        {
            "model": {
                "name": "vmoe_s32_last2_e8_384",
                "checkpoint": "vmoe_s32_last2_e8.randaug_light1_in1k",
                # As many classes, but that head was trained with the sigmoid loss.
                "drop_head": True,
            },
            "data": {
                "batch_size": 1024,
                "eval_batch_size": 128,
                "workers": 12,
                "interpolation": "bilinear",
                "scale": [0.05, 1.0],
                "crop_pct": 1.0,
                "crop_mode": "squash",
            },
            "optim": {"name": "momentum", "lr": 3e-3, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 10.0},
            "schedule": {
                "name": "cosine",
                "updates": 10_000,
                "warmup_updates": 500,
                "warmup_prefix": True,
                "min_lr": 1e-5,
            },
            "run": {"output": "runs/finetune_in1k_384", "precision": "bfloat16", "checkpoint_every": 1000},
        }
    )
