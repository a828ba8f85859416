"""Forwards of one batch at many routing settings: what comes before the first change runs once for all of them."""

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
    sparse = _sparse_blocks(model)[:1]
    kept: dict[int, Tensor] = {}

    def forward() -> Tensor:
        return _resumed(model, sparse[0], kept) if kept else _kept_forward(model, images, sparse, kept)

    return forward if sparse else lambda: model(images)


def layer_forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Callable[[MoeMlp], Tensor]]:
    """The model's logits, and its forwards to be called when the routing of one layer has changed.

    Of a Vision Transformer these run from that layer's block on, so the layers before it must be routed as they were;
    the logits are those of `model(images)` bit for bit. Other models run whole at every call.

    Args:
        model: in eval mode.
        images: (B, C, H, W).

    Returns:
        Logits (B, N) at the routing that is set, and a function of the changed layer that gives them anew.
    """
    sparse = _sparse_blocks(model)
    kept: dict[int, Tensor] = {}
    logits = _kept_forward(model, images, sparse, kept)

    def forward(layer: MoeMlp) -> Tensor:
        for number in sparse:
            if any(module is layer for module in model.blocks[number].modules()):
                return _resumed(model, number, kept)
        return model(images)

    return logits, forward


def _kept_forward(model: nn.Module, images: Tensor, blocks: list[int], kept: dict[int, Tensor]) -> Tensor:
    """A whole forward that leaves the input of each of these blocks in `kept`."""

    def keep(number: int) -> Callable:
        return lambda _, inputs: kept.__setitem__(number, inputs[0])

    hooks = [model.blocks[number].register_forward_pre_hook(keep(number)) for number in blocks]
    try:
        return model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _resumed(model: nn.Module, block: int, kept: dict[int, Tensor]) -> Tensor:
    return model.forward_head(model.norm(model.blocks[block:](kept[block])))


def _sparse_blocks(model: nn.Module) -> list[int]:
    """Numbers of the blocks with experts, if the model goes through its blocks as timm's own does; else none."""
    cls = type(model)
    base = VisionTransformer
    if (
        not isinstance(model, base)
        or cls.forward is not base.forward
        or cls.forward_features is not base.forward_features
    ):
        return []
    return [
        number
        for number, block in enumerate(model.blocks)
        if any(isinstance(module, MoeMlp) for module in block.modules())
    ]
