"""Writes the tables of docs/choosing.md; every number in it is computed from the code, without weights and a GPU.

python docs/make_tables.py
"""

from pathlib import Path

import timm
import torch

import vmoe_torch
from vmoe_torch.evaluate import count_flops
from vmoe_torch.parallel import PlannedRun, plan

PAGE = Path(__file__).parent / "choosing.md"
MODELS = (
    "vmoe_s32_last2_e8",
    "vmoe_s32",
    "vmoe_b32",
    "vmoe_b16_e8",
    "vmoe_b16",
    "vmoe_l32_last2",
    "vmoe_l32",
    "vmoe_l16_last2",
    "vmoe_l16",
    "vmoe_h14_last5",
    "vmoe_h14",
    "vmoe_15b",
)
# Columns of GFLOPs: K and C.
SETTINGS = ((2, 1.05), (1, 1.05), (1, 0.5))
GPUS, IMAGES = 8, 32
HEADS = (
    ("model", "sparse blocks x experts", "parameters", "used by a token", "GB per GPU", "recomputed"),
    ("model", *(f"K={k}, C={c}" for k, c in SETTINGS), "dense ViT"),
)


def row(name: str) -> tuple[list[str], list[str]]:
    """The cells of a model in both tables."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
        images = torch.empty(8, 3, *model.patch_embed.img_size)
    layers = vmoe_torch.moe_layers(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    resting = 0
    for layer in layers.values():
        held = sum(parameter.numel() for part in (layer.fc1, layer.fc2) for parameter in part.parameters())
        resting += held * (layer.num_experts - layer.num_selected_experts) // layer.num_experts
    first = next(iter(layers.values()))
    flops = []
    for k, capacity in SETTINGS:
        with vmoe_torch.routing(model, num_selected_experts=k, capacity_factor=capacity):
            counted = count_flops(model, images)
        flops.append(counted.total)
    plans = [plan(model, PlannedRun(GPUS, GPUS, GPUS * IMAGES, recompute=again, autocast=True)) for again in (0, 1)]
    held = [f"{each.held / 1e9:.1f}{'' if each.fits else ' (!)'}" for each in plans]
    sizes = [f"{len(layers)} of {len(model.blocks)} x {first.num_experts}", f"{total / 1e6:,.0f} M"]
    return (
        [f"`{name}`", *sizes, f"{(total - resting) / 1e6:,.0f} M", *held],
        [f"`{name}`", *(f"{each / 1e9:,.1f}" for each in (*flops, counted.dense))],
    )


def with_tables(text: str) -> str:
    """A page with the tables as they are now in place of those that begin as ours do."""
    for head, rows in zip(HEADS, zip(*map(row, MODELS))):
        table = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        begin = text.index(f"| {' | '.join(head[:2])} |")
        made = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
        text = text[:begin] + made + text[text.index("\n\n", begin) + 1 :]
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
