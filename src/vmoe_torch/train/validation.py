"""Loss and accuracy on the validation images, shared among the processes."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from vmoe_torch.control import eval_mode
from vmoe_torch.data.loader import NO_LABEL, Batches
from vmoe_torch.train.process_group import Processes


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Batches,
    group: Processes,
    dtype: torch.dtype = torch.float32,
    count: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """Cross-entropy and top-1 accuracy over all processes' batches, in eval mode; every module gets its own mode
    back, also after an error.

    Args:
        model: gives logits (B, N).
        batches: (images, labels) of this process; an image with label NO_LABEL does not count.
        group: the processes.
        dtype: of autocast; float32 for none.
        count: how many of this process's images count, the first ones; None for all.
        stop: asked between batches whether to give up.

    Returns:
        (mean loss, accuracy in 0..1), or None if it gave up.
    """
    device = group.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    seen = 0
    with eval_mode(model):
        for images, labels in batches:
            if stop():
                return None
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = model(images)
            if count is not None:
                keep = min(max(count - seen, 0), labels.shape[0])
                seen += labels.shape[0]
                logits, labels = logits[:keep], labels[:keep]
            sums[0] += F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=NO_LABEL)
            sums[1] += (logits.argmax(1) == labels).sum()
            sums[2] += (labels != NO_LABEL).sum()
    # The batches may have ended early for the same reason.
    if stop():
        return None
    loss, correct, images = group.sum(sums).tolist()
    return loss / images, correct / images
