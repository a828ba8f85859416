"""The released V-MoE-B/16 (ImageNet-21k) transferred to CIFAR-10 at 128 px, as the original did it.

Command: vmoe train --recipe finetune_cifar10 data.root=CIFAR10
Data: folders train/ and val/ with one folder for each of the 10 classes.
Hardware: one GPU of 80 GB; a smaller one takes optim.accumulation=4.
Cost: 1,000 updates of 1,024 images; the original took about 10 min on a TPUv3-8.
Result: not yet run. The original reports 98.7% top-1 on the test images, the mean of three seeds.
"""

from vmoe_torch.recipes import finetune_in1k_384
from vmoe_torch.train.config import Config


def config() -> Config:
    """finetune_in1k_384 for a small data set: smaller images, a tenth of the updates, half the learning rate."""
    return finetune_in1k_384.config().override(
        "model.name=vmoe_b16_e8",
        "model.checkpoint=vmoe_b16_e8.randaug_strong_in21k",
        "model.kwargs.img_size=128",
        "model.kwargs.capacity_factor=1.5",
        "optim.lr=1.5e-3",
        "schedule.updates=1000",
        "schedule.warmup_updates=100",
        "run.output=runs/finetune_cifar10",
        "run.checkpoint_every=100",
    )
