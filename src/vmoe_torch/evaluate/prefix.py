"""Forwards of one batch at many routing settings: the blocks before the first MoE layer run once for all of them."""

from collections.abc import Callable

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vmoe_torch.layers import MoeMlp


def shared_forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The model's forward on these images, to be called again whenever its routing has changed.

    Of a Vision Transformer only the first call runs the part that no routing changes; the logits are those of
    `model(images)` bit for bit. Other models run whole at every call.

    Args:
        model: in eval mode.
        images: (B, C, H, W).

    Returns:
        A function of nothing that gives the logits (B, N).
    """
    first = _first_sparse_block(model)
    if first is None:
        return lambda: model(images)
    kept: list[Tensor] = []

    def forward() -> Tensor:
        if kept:
            return model.forward_head(model.norm(model.blocks[first:](kept[0])))
        hook = model.blocks[first].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            return model(images)
        finally:
            hook.remove()

    return forward


def _first_sparse_block(model: nn.Module) -> int | None:
    """Number of the first block with experts, if the model goes through its blocks as timm's own does."""
    cls = type(model)
    base = VisionTransformer
    if (
        not isinstance(model, base)
        or cls.forward is not base.forward
        or cls.forward_features is not base.forward_features
    ):
        return None
    sparse = [any(isinstance(module, MoeMlp) for module in block.modules()) for block in model.blocks]
    return sparse.index(True) if True in sparse else None
