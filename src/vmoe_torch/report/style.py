"""How the figures look, and what they call things.

Colours are those of Okabe and Ito and of the cividis map, which colour-blind readers can tell apart.
"""

import re

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
# Flat and pale blue, which no grey image has; also where nothing was counted.
HIDDEN = (0.70, 0.80, 0.93)


def layer_label(name: str) -> str:
    """What to call a layer before people: "block 3" for "blocks.3.mlp"; names of another form stay."""
    found = re.fullmatch(r"blocks\.(\d+)\.mlp(?:\.members\.(\d+))?", name)
    if found is None:
        return name
    block, member = found.groups()
    return f"block {block}" if member is None else f"block {block}, member {member}"


def percent(share: float) -> str:
    """A share in 0..1 as text."""
    return f"{100 * share:.1f}%"


def shorten(text: str, length: int = 18) -> str:
    """At most so many characters, the last one an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def flops_unit(largest: float) -> tuple[float, str]:
    """What to divide FLOPs by, and the unit's name, so that the largest number stays short."""
    for factor, name in ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")):
        if largest >= factor:
            return factor, name
    return 1e3, "kFLOPs"
