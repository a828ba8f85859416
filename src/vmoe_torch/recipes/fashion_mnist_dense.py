"""The dense ViT of the same width and depth as the V-MoE of `fashion_mnist`, trained in the same way.

Command, for as many updates as the V-MoE's: vmoe train --recipe fashion_mnist_dense data.root=FOLDER run.seed=0
Command, for as many training FLOPs (2% more): the same with schedule.epochs=5
Hardware: one CPU core.
Cost: not yet run
Result: not yet run
"""

from vmoe_torch.recipes import fashion_mnist
from vmoe_torch.train import Config


def config() -> Config:
    """The V-MoE's configuration, with a plain MLP in every block."""
    return fashion_mnist.config().override("model.kwargs.moe_layers=[]", "run.output=runs/fashion_mnist_dense")
