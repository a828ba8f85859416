"""What the experts of each MoE layer go by: the character, the typeface, the place in the image, or the ink there.

Dims: B images of H x W pixels, L patches each, E experts.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vmoe_torch.control import moe_layers

# Of a patch's mean between the least and the most that an image has.
INK_LEVELS = 8
# Patches and characters of an expert that are shown.
SHOWN = 12


def routed(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], faces: np.ndarray, classes: int, patch: int
) -> tuple[dict[str, dict[str, dict]], dict[str, np.ndarray]]:
    """Counts first choices by what they may go by, and keeps what a picture of them needs.

    Args:
        model: in eval mode, without a class token.
        batches: ((B, 1, H, W) images, (B,) characters), in order.
        faces: typeface of each image.
        classes: number of characters.
        patch: side of a patch in pixels.

    Returns:
        {layer: {"character" | "typeface" | "place" | "ink": `information`}}, and arrays: "first" and "last",
        (classes, E) choices in these MoE layers; of the last one, for each expert the `SHOWN` patches that are surest
        of it, of characters that differ: "images" (E, SHOWN, H, W) uint8 and "places" (E, SHOWN), -1 where there are
        fewer; and "glyphs", (classes, H, W) uint8, one image of each character.
    """
    layers = moe_layers(model)
    counts: dict[str, dict[str, np.ndarray]] = {name: {} for name in layers}
    sizes = {"character": classes, "typeface": int(faces.max()) + 1, "ink": INK_LEVELS}
    last = next(reversed(layers))
    surest = _Surest(layers[last].num_experts)
    glyphs: dict[int, np.ndarray] = {}
    begin, dark, light = 0, float("inf"), float("-inf")
    with torch.no_grad():
        for images, labels in batches:
            dark, light = min(dark, images.min().item()), max(light, images.max().item())
            ink = avg_pool2d(images, patch).flatten(1)
            level = ((ink - dark) / max(light - dark, 1e-6) * INK_LEVELS).long().clamp(0, INK_LEVELS - 1)
            model(images)
            drawn = ((images[:, 0] - dark) / max(light - dark, 1e-6) * 255).to(torch.uint8).numpy()
            for label, glyph in zip(labels.tolist(), drawn):
                glyphs.setdefault(label, glyph)
            own = torch.from_numpy(faces[begin : begin + len(images)])
            begin += len(images)
            seen = {
                "character": labels[:, None].expand_as(level),
                "typeface": own[:, None].expand_as(level),
                "place": torch.arange(level.shape[1]).expand_as(level),
                "ink": level,
            }
            for name, layer in layers.items():
                experts = layer.record.experts[:, 0].long().view_as(level)
                for what, values in seen.items():
                    size = sizes.get(what, ink.shape[1]), layer.num_experts
                    chosen = torch.bincount((values * size[1] + experts).flatten(), minlength=math.prod(size))
                    counts[name][what] = counts[name].get(what, 0) + chosen.view(size).numpy()
                if name == last:
                    gates = layer.record.gates.max(1).values.view_as(level)
                    surest.see(gates, experts, drawn, labels)
    found = {name: {what: information(grid) for what, grid in own.items()} for name, own in counts.items()}
    first = counts[next(iter(layers))]["character"]
    arrays = surest.arrays(drawn.shape[1:])
    arrays["glyphs"] = np.stack([glyphs.get(label, np.zeros(drawn.shape[1:], np.uint8)) for label in range(classes)])
    return found, {"first": first, "last": counts[last]["character"], **arrays}


class _Surest:
    """Of every expert the patches with the largest gates, one of a character."""

    def __init__(self, num_experts: int):
        self.best: list[dict[int, tuple[float, int, np.ndarray]]] = [{} for _ in range(num_experts)]

    def see(self, gates: Tensor, experts: Tensor, images: np.ndarray, labels: Tensor) -> None:
        for expert, best in enumerate(self.best):
            gate, place = gates.where(experts == expert, -1.0).max(1)
            for number in gate.topk(min(2 * SHOWN, len(gate))).indices.tolist():
                label, value = int(labels[number]), float(gate[number])
                if value > best.get(label, (0.0,))[0]:
                    best[label] = (value, int(place[number]), images[number])
            for label in sorted(best, key=lambda each: -best[each][0])[SHOWN:]:
                del best[label]

    def arrays(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        images = np.zeros((len(self.best), SHOWN, *shape), np.uint8)
        places = np.full((len(self.best), SHOWN), -1)
        for expert, best in enumerate(self.best):
            for column, (_, place, image) in enumerate(sorted(best.values(), key=lambda each: -each[0])):
                images[expert, column], places[expert, column] = image, place
        return {"images": images, "places": places}


def information(counts: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mutual information of class and expert in bits, and what it is by chance: with the experts shuffled.

    Args:
        counts: (N, E) choices.
        seed: of the shuffling, which keeps how many choices a class made and how many an expert had.
    """
    rng = np.random.default_rng(seed)
    totals = counts.sum(1)
    shuffled = rng.permutation(np.repeat(np.arange(counts.shape[1]), counts.sum(0)))
    classes = np.repeat(np.arange(counts.shape[0]), totals)
    chance = np.zeros_like(counts)
    np.add.at(chance, (classes, shuffled), 1)
    return {"bits": _bits(counts), "chance": _bits(chance), "most": float(np.log2(min(counts.shape)))}


def _bits(counts: np.ndarray) -> float:
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())
