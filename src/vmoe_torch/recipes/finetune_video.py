"""The released V-MoE-B/16 (ImageNet-21k), inflated and fine-tuned on videos, after VideoMAE (arXiv 2203.12602).

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe finetune_video data.root=KINETICS
Another start: model.checkpoint=RUN, FILE or PREFIX of a V-MoE of images or of videos.
Data: folders train/ and val/ with one folder of videos per class each. Clips are 16 frames, 4 apart, as the model says;
what moves fast in short videos, as in Something-Something, takes data.frame_stride=2 data.hflip=0.
Evaluation: vmoe eval runs/finetune_video --data KINETICS --views 8x3, softmax averaged, as V-JEPA 2 (arXiv 2506.09985).
Hardware: 8 GPUs of 80 GB; fewer take optim.accumulation.
Cost: 30 epochs of clips; a clip's forward is some 0.54 TFLOPs.
Result: not yet run. The inflated V-MoE begins from images alone, VideoMAE's models from videos without labels.
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """AdamW with layer decay, mixup, CutMix and smoothed labels; groups are single clips, capacity 1.5."""
    return Config.from_dict(
        {
            "model": {
                "name": "vmoe_video_b16",
                "checkpoint": "vmoe_b16_e8.randaug_strong_in21k",
                "drop_head": True,
                "kwargs": {"num_experts": 8, "capacity_factor": 1.5, "drop_path_rate": 0.1},
            },
            "data": {
                "name": "video",
                "batch_size": 256,
                "eval_batch_size": 64,
                "workers": 12,
                "scale": [0.5, 1.0],
                "auto_augment": "rand-m7-n4-mstd0.5-inc1",
                "random_erasing": 0.25,
                "mixup": 0.8,
                "cutmix": 1.0,
            },
            "loss": {"label_smoothing": 0.1},
            "optim": {
                "name": "adamw",
                "lr": 1e-3,
                "betas": [0.9, 0.999],
                "weight_decay": 0.05,
                "layer_decay": 0.75,
                "clip_norm": 1.0,
            },
            "schedule": {"name": "cosine", "epochs": 30, "warmup_epochs": 5, "min_lr": 1e-6},
            "run": {"output": "runs/finetune_video", "precision": "bfloat16"},
        }
    )
