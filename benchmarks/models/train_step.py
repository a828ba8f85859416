"""A training step, forward, backward and AdamW, of a V-MoE (K=1, C=1) beside timm's dense ViT of its dims.

FLOPs are equal, parameters are not: an optimiser visits every expert's weights, whatever the tokens did.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.pairs import PAIRS, Pair, check_models, make_models
from benchmarks.harness.protocol import one_update
from benchmarks.harness.session import Session
from benchmarks.models.speed import time_calls

OP = "train_step"


def run(session: Session, pair: Pair | None = None) -> None:
    """Both models in turn, wall-clock over whole steps."""
    if not session.begin(OP):
        return
    models, x = make_models(pair or PAIRS[session.device.type], session.device, session.dtype)
    check_models(models, x)
    labels = torch.arange(len(x), device=session.device)
    calls = {name: _step(model.train(), x, labels) for name, model in models.items()}
    time_calls(session, OP, "both", f"B={len(x)} {x.shape[-1]} px, AdamW", calls)


def _step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return one_update(lambda: F.cross_entropy(model(x).float(), labels), optimizer)
