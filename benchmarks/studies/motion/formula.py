"""Parameters and FLOPs of Vision Transformers with experts on paper, to hold what is counted against.

Dims: S patches and L tokens of a clip or an image, D width, H hidden width, E experts, K selected, C capacity factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch

from vmoe_torch.evaluate import count_flops


@dataclass(frozen=True)
class Shape:
    """What decides both, of a model with a learned position for each token and biases everywhere but in the routers."""

    width: int
    """D."""
    depth: int
    """Blocks."""
    hidden: int
    """H, of an MLP and of an expert."""
    patches: int
    """S."""
    values: int
    """Numbers in a patch: pixels of all its frames, times channels."""
    classes: int
    """Outputs."""
    sparse: int = 0
    """Blocks with experts."""
    experts: int = 1
    """E."""
    selected: int = 1
    """K."""
    capacity: float = 1.05
    """C."""
    multiple: int = 1
    """What the number of slots of an expert is rounded up to a multiple of."""
    group: int = 1
    """Clips or images that share slots."""
    prefix: int = 0
    """Tokens that are no patches."""

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        width, hidden = self.width, self.hidden
        attention = 4 * width * width + 4 * width
        norms = 4 * width
        mlp = 2 * width * hidden + hidden + width
        ends = self.values * width + width + (self.patches + 2 * self.prefix) * width + 2 * width
        ends += self.classes * (width + 1)
        experts = self.sparse * (self.experts * mlp + width * self.experts)
        return ends + self.depth * (attention + norms) + (self.depth - self.sparse) * mlp + experts

    @property
    def flops(self) -> float:
        """Of a clip or an image, experts at full capacity; a multiply-add is two."""
        width, hidden, length = self.width, self.hidden, self.patches + self.prefix
        attention = 8 * length * width * width + 4 * length * length * width
        ends = 2 * self.patches * self.values * width + 2 * width * self.classes
        slots = math.ceil(self.group * length * self.selected * self.capacity / self.experts)
        slots = self.multiple * math.ceil(slots / self.multiple)
        experts = 2 * length * width * self.experts + 4 * self.experts * slots * width * hidden / self.group
        dense = (self.depth - self.sparse) * 4 * length * width * hidden
        return ends + self.depth * attention + dense + self.sparse * experts


def _registered(width: int, depth: int) -> Shape:
    """Clips of 16 frames of 224 x 224 pixels in tubelets of 2 x 16 x 16."""
    sizes = {"width": width, "depth": depth, "hidden": 4 * width, "patches": 8 * 14 * 14, "values": 3 * 2 * 16 * 16}
    experts = {"sparse": depth // 2, "experts": 32, "selected": 2, "multiple": 4}
    return Shape(**sizes, **experts, classes=400, prefix=1)


REGISTERED = {
    "vmoe_video_s16": _registered(512, 8),
    "vmoe_video_b16": _registered(768, 12),
    "vmoe_video_l16": _registered(1024, 24),
}


def registered() -> list[dict]:
    """Of each registered video model what is counted, and what the formula says."""
    rows = []
    for name, shape in REGISTERED.items():
        model = timm.create_model(name, num_classes=shape.classes, device="meta")
        clips = torch.empty(1, 3, model.num_frames, *model.patch_embed.img_size, device="meta")
        rows.append(
            {
                "name": name,
                "tokens": model.patch_embed.num_patches + model.num_prefix_tokens,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "formula_parameters": shape.parameters,
                "flops": count_flops(model, clips).total,
                "formula_flops": shape.flops,
            }
        )
    return rows


def registered_table(rows: Sequence[dict]) -> list[str]:
    """Markdown lines of them."""
    lines = [
        "| model | tokens of a clip | parameters, M | by the formula | GFLOPs, K=2, C=1.05 | by the formula |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        parameters = " | ".join(f"{row[key] / 1e6:,.1f}" for key in ("parameters", "formula_parameters"))
        flops = " | ".join(f"{row[key] / 1e9:,.1f}" for key in ("flops", "formula_flops"))
        lines.append(f"| `{row['name']}` | {row['tokens']:,} | {parameters} | {flops} |")
    return lines
