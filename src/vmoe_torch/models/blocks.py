"""Which blocks of a Vision Transformer are sparse, and such a block."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from timm.models import vision_transformer as vit

from vmoe_kernels.common.checks import check_integer
from vmoe_torch.layers import MoeMlp
from vmoe_torch.models.options import MoeLayers


def parse_moe_layers(moe_layers: MoeLayers, depth: int) -> tuple[int, ...]:
    """Block numbers of the MoE layers.

    Args:
        moe_layers: "everyN" (blocks N-1, 2N-1, ...), "lastN" (the last N odd blocks), or block numbers.
        depth: number of blocks.

    Returns:
        Sorted block numbers.

    Raises:
        ValueError: if the word is unknown or a block does not exist.
    """
    if isinstance(moe_layers, str):
        for word, blocks in (("every", range(depth)), ("last", range(1, depth, 2))):
            number = moe_layers.removeprefix(word)
            if number != moe_layers and number.isdigit() and int(number) >= 1:
                number = int(number)
                if word == "every":
                    return tuple(blocks[number - 1 :: number])
                if number <= len(blocks):
                    return tuple(blocks[-number:])
        raise ValueError(
            f"moe_layers must be 'everyN', 'lastN' with N of the odd-numbered blocks at most, or block numbers below "
            f"{depth}, got {moe_layers!r}"
        )
    blocks = moe_layers if isinstance(moe_layers, Iterable) else [moe_layers]
    rule = f"block numbers in 0..{depth - 1}"
    return tuple(sorted({check_integer("moe_layers", block, 0, rule, depth - 1) for block in blocks}))


class MoeBlock(vit.Block):
    """timm's Block, with a MoeMlp where `depth` is among `moe_layers`.

    `moe` has the arguments of `MoeMlp`; num_experts may be a dict, {number of a block: E}.
    """

    def __init__(
        self, *args: Any, depth: int = 0, moe_layers: tuple[int, ...] = (), moe: dict[str, Any], **kwargs: Any
    ) -> None:
        if depth in moe_layers:
            experts = moe["num_experts"]
            own = experts[depth] if isinstance(experts, dict) else experts
            kwargs["mlp_layer"] = partial(MoeMlp, **{**moe, "num_experts": own})
        super().__init__(*args, depth=depth, **kwargs)
