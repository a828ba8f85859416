"""A small V-MoE that reads characters in typefaces it has never seen, from fonts, on a CPU.

Command: vmoe train --recipe typefaces data.root=FONTS
    FONTS: train/, val/ and characters.txt, see docs/training.md; `python -m benchmarks.studies.typefaces` makes one of
    Debian's fonts in runs/typefaces/fonts, and trains this model as `sparse_middle_0`.
Hardware: one CPU core.
Cost: 12 minutes; 409,600 images
Result: 90.07 ± 1.84 % of 2,965 characters in six typefaces of families never trained on, three seeds; the dense ViT for
    as many training FLOPs 80.57 ± 5.11 %
"""

from vmoe_torch.train.config import Config


def config() -> Config:
    """6 blocks of width 64 on patches of 8 x 8; every second with 32 experts of half the width, 2 a patch, dropless."""
    model = {
        "img_size": 32,
        "patch_size": 8,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
        "pos_embed": "sincos2d",
        "moe_layers": "every2",
        "num_experts": 32,
        "num_selected_experts": 2,
        # Two gates that sum to 1: a patch begins with as much of its experts as a dense MLP would give it.
        "renormalize_gates": True,
        # Two halves cost what one whole expert does, and there are 496 pairs of them.
        "expert_hidden": (0.5,) * 32,
        "capacity_factor": "dropless",
        "group_size": 128,
    }
    return Config.from_dict(
        {
            "model": {"name": "vmoe_s32", "kwargs": model},
            "data": {"name": "typefaces", "batch_size": 128, "eval_batch_size": 256},
            "optim": {"name": "muon", "lr": 6e-3, "weight_decay": 0.05, "ema_decay": 0.998},
            "schedule": {"updates": 3200, "warmup_updates": 200},
            "run": {"output": "runs/typefaces/recipe", "log_every": 50, "checkpoint_every": 400},
        }
    )
