"""A small video V-MoE that tells which way drawn characters move, from video files, on a CPU.

Command: vmoe train --recipe moving_characters data.root=CLIPS
    CLIPS: python -m benchmarks.studies.motion.files FONTS CLIPS --characters ABEFGKRS --clips 8 --frames 8
Hardware: one CPU core.
Cost: 4.6 processor minutes, in 8 minutes beside other work; 30,720 clips
Result: 32.7 % of the 64 classes (8 motions of 8 letters) in a family of typefaces that it was not trained on, one seed,
    and 45 % of the training clips of its last epoch.
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """4 blocks of width 96 on tubelets of 2 x 8 x 8, 8 experts in every second block, groups of a clip.

    Clips are not mirrored: left would become right.
    """
    model = {
        "img_size": 32,
        "patch_size": 8,
        "num_frames": 8,
        "tubelet_size": 2,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "avg",
        "moe_layers": "every2",
        "num_experts": 8,
        "num_selected_experts": 1,
        "capacity_factor": 1.05,
        "capacity_multiple_of": 1,
    }
    return Config.from_dict(
        {
            "model": {"name": "vmoe_video_s16", "kwargs": model},
            "data": {
                "name": "video",
                "frame_stride": 1.0,
                "batch_size": 64,
                "eval_batch_size": 64,
                "scale": [0.85, 1.0],
                "ratio": [1.0, 1.0],
                "hflip": 0.0,
                "crop_pct": 1.0,
            },
            "optim": {"lr": 2e-3, "weight_decay": 0.05},
            "schedule": {"epochs": 5, "warmup_epochs": 0.6},
            "run": {"output": "runs/moving_characters"},
        }
    )
