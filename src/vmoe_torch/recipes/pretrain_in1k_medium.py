"""V-MoE-S/32 (last 2, E=8) from scratch on ILSVRC2012, 1,000 epochs with medium augmentation.

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe pretrain_in1k_medium data.root=ILSVRC2012
Data, hardware: as pretrain_in1k_light1.
Cost: 156,000 updates.
Result: not yet run. The original released a model so trained without its configuration: RandAugment(2, 15) is that of
both its "medium" settings, mixup is 0.2 in the first and 0.5 in the second (data.mixup=0.5).
"""

from vmoe_torch.recipes import pretrain_in1k_light1
from vmoe_torch.train.config import Config


def config() -> Config:
    """pretrain_in1k_light1 with RandAugment(2, 15), for longer."""
    return pretrain_in1k_light1.config().override(
        "data.auto_augment=rand-m15-n2-mmax15-p1.0",
        "schedule.epochs=1000",
        "run.output=runs/pretrain_in1k_medium",
    )
