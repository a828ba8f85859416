"""A dense ViT-B/16 of timm made sparse (arXiv 2212.05055) and fine-tuned on ILSVRC2012 at 384 px.

Command: torchrun --nproc-per-node 8 -m vmoe_torch.cli train --recipe finetune_upcycled data.root=ILSVRC2012
A dense run of your own: model.pretrained=false model.checkpoint=RUN, with the model.name and model.kwargs of the run.
Data: folders train/ and val/ with one folder per class each.
Hardware: 8 GPUs; one does it with optim.accumulation=8.
Cost: 10,000 updates of 1,024 images.
Result: not yet run. At small scale, see benchmarks/studies/upcycle.py.
"""

from vmoe_torch.recipes import finetune_in1k_384
from vmoe_torch.train.config import Config


def config() -> Config:
    """finetune_in1k_384 from a dense model: every second MLP becomes eight experts, gates sum to 1."""
    return finetune_in1k_384.config().override(
        "model.name=vit_base_patch16_224.augreg_in21k",
        "model.checkpoint=none",
        "model.pretrained=true",
        "model.kwargs.img_size=384",
        "model.upcycle.moe_layers=every2",
        "model.upcycle.num_experts=8",
        "model.upcycle.capacity_factor=1.5",
        # The new model then begins as good as the dense one, as far as no token is dropped.
        "model.upcycle.renormalize_gates=true",
        "run.output=runs/finetune_upcycled",
    )
